"""What the hub refuses is told apart, for adapters, classifiers and data sets alike."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from huggingface_hub import errors as hub

from braces_cli.core.adapter.files import find_adapter
from braces_cli.core.errors import DataError, ModelError
from braces_cli.core.models.hub import hub_errors
from braces_cli.data.rows import read_rows
from braces_cli.evaluation.systems import find_eval_adapter
from braces_cli.scoring.scorers import scorer


def refusal(kind: type[Exception], status: int) -> Exception:
    """An error of the hub's client with the reply that caused it."""
    # Not by calling the class: what its constructor wants differs between versions of the client.
    error = kind.__new__(kind, "refused")
    error.response = SimpleNamespace(status_code=status)
    return error


# What the hub answers, and the words and the hint that tell a user what it was.
CASES = {
    "gated": (lambda: refusal(hub.GatedRepoError, 403), "is restricted", "HF_TOKEN"),
    "unauthorised": (lambda: refusal(hub.HfHubHTTPError, 401), "or it is private or gated", "HF_TOKEN"),
    "not found": (lambda: refusal(hub.RepositoryNotFoundError, 404), "on the hub, or it is private", "HF_TOKEN"),
    "offline": (lambda: hub.OfflineModeIsEnabled("offline"), "the hub cannot be reached", "network"),
    "no connection": (lambda: ConnectionError("no route to host"), "the hub cannot be reached", "network"),
}


@pytest.fixture(params=list(CASES))
def case(request, monkeypatch):
    """A fake hub that answers every request in one way: (the words, the hint) that the user is to see."""
    make, words, hint = CASES[request.param]

    def refuse(*args, **kwargs):
        raise make()

    if "offline" not in words and "reached" not in words:
        # The test suite is offline, which would explain every failure.
        monkeypatch.delenv("HF_HUB_OFFLINE")
    for name in (
        "huggingface_hub.snapshot_download",
        "transformers.AutoTokenizer.from_pretrained",
        "datasets.load_dataset",
    ):
        monkeypatch.setattr(name, refuse)
    return words, hint


@pytest.mark.parametrize("find", [find_adapter, find_eval_adapter])
def test_of_adapters(case, find):
    words, hint = case
    with pytest.raises(ModelError) as caught:
        find("someone/something")
    assert words in caught.value.message
    assert "adapter" in caught.value.message
    assert hint in caught.value.hint
    assert caught.value.where == "someone/something"


def test_of_classifiers(case):
    words, hint = case
    with pytest.raises(ModelError) as caught:
        scorer("someone/something")
    assert words in caught.value.message
    assert "classifier" in caught.value.message
    assert hint in caught.value.hint


def test_of_data_sets(case):
    words, hint = case
    with pytest.raises(DataError) as caught:
        list(read_rows("someone/something:train"))
    assert words in caught.value.message
    assert "data set" in caught.value.message
    assert hint in caught.value.hint
    assert "something:train/" not in caught.value.hint


def test_a_fault_of_our_own_is_not_explained_away():
    """Only what the libraries raise about files and networks becomes an error of the user's."""
    with pytest.raises(AttributeError), hub_errors("someone/something", "model"):
        raise AttributeError("no such attribute")
