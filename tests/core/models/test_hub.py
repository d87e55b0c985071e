"""Errors of the hub for adapters, classifiers and data sets; headers of model cards."""

from types import SimpleNamespace

import pytest
from huggingface_hub import ModelCard
from huggingface_hub import errors as hub

from braces_cli.core.adapter.files import AdapterConfig, find_adapter
from braces_cli.core.errors import DataError, ModelError
from braces_cli.core.models.hub import embedded_name, hub_errors, known_license
from braces_cli.data.rows import read_rows
from braces_cli.evaluation.systems import find_eval_adapter
from braces_cli.scoring.scorers import scorer
from braces_cli.training.report import model_card


def refusal(kind: type[Exception], status: int) -> Exception:
    """An error of the hub's client with the reply that caused it."""
    # The arguments of the constructor differ between versions of the client.
    error = kind.__new__(kind, "refused")
    error.response = SimpleNamespace(status_code=status)
    return error


# Reply of the hub, words of the message, words of the hint.
CASES = {
    "gated": (lambda: refusal(hub.GatedRepoError, 403), "is restricted", "HF_TOKEN"),
    "unauthorised": (lambda: refusal(hub.HfHubHTTPError, 401), "or it is private or gated", "HF_TOKEN"),
    "not found": (lambda: refusal(hub.RepositoryNotFoundError, 404), "on the hub, or it is private", "HF_TOKEN"),
    "offline": (lambda: hub.OfflineModeIsEnabled("offline"), "the hub cannot be reached", "network"),
    "no connection": (lambda: ConnectionError("no route to host"), "the hub cannot be reached", "network"),
}


@pytest.fixture(params=list(CASES))
def case(request, monkeypatch):
    """A hub that fails every request in one way; returns words of the expected message and hint."""
    make, words, hint = CASES[request.param]

    def refuse(*args, **kwargs):
        raise make()

    if "offline" not in words and "reached" not in words:
        # The test suite is offline, which would otherwise be the reason in every message.
        monkeypatch.delenv("HF_HUB_OFFLINE")
    for name in (
        "huggingface_hub.snapshot_download",
        "transformers.AutoTokenizer.from_pretrained",
        "datasets.load_dataset",
    ):
        monkeypatch.setattr(name, refuse)
    return words, hint


@pytest.mark.parametrize(
    ("load", "what"),
    [
        (find_adapter, "adapter"),
        (find_eval_adapter, "adapter"),
        (scorer, "classifier"),
        (lambda name: list(read_rows(f"{name}:train")), "data set"),
    ],
)
def test_errors_of_adapters_classifiers_and_data_sets(case, load, what):
    words, hint = case
    with pytest.raises(DataError if what == "data set" else ModelError) as caught:
        load("someone/something")
    assert words in caught.value.message
    assert what in caught.value.message
    assert hint in caught.value.hint
    assert caught.value.where.startswith("someone/something")
    assert "something:train/" not in caught.value.hint


def test_a_bug_is_not_turned_into_a_user_error():
    """Only errors of libraries about files and networks become user errors."""
    with pytest.raises(AttributeError), hub_errors("someone/something", "model"):
        raise AttributeError("no such attribute")


def header(base, **result):
    config = AdapterConfig(base, 4, [0], {})
    result = {"trainable_parameters": 1, "trainable_percent": 1.0, **result}
    return ModelCard(model_card(config, result, {"eval_data": ["/somewhere/dev.jsonl"]})).data


def test_the_fields_that_the_hub_knows():
    read = header("owner/base", eval_perplexity=12.5, eval_loss=2.526)
    assert read.base_model == "owner/base"
    assert read.base_model_relation == "adapter"
    assert read.library_name == "braces"
    assert read.pipeline_tag == "text-generation"
    assert read.tags == ["llmbraces", "adapter"]
    assert read.model_name == "LLMBraces adapter"
    assert [(one.metric_type, one.metric_value, one.dataset_name) for one in read.eval_results] == [
        ("loss", 2.526, "dev.jsonl"),
        ("perplexity", 12.5, "dev.jsonl"),
    ]


@pytest.mark.parametrize("base", ["/disk/model", "./model", "~/model", "embedded@1", "C:/models/x"])
def test_a_base_that_is_not_on_the_hub_is_not_linked(base):
    read = header(base)
    assert read.base_model is None
    assert "base_model_relation" not in read.to_dict()
    assert "model-index" not in read.to_dict()


def test_the_licence_is_that_of_the_base_where_it_is_known(tmp_path):
    assert known_license(embedded_name()) == "apache-2.0"
    assert known_license("owner/base") is None
    assert known_license(str(tmp_path)) is None
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n\n# x\n")
    assert header(str(tmp_path)).license == "mit"


@pytest.mark.parametrize(
    "text", ["no header", "---\nlicense: [\n---\n", "---\n- a\n---\n", "---\nlicense: [a, b]\n---\n"]
)
def test_a_broken_card_of_the_base_gives_no_licence(tmp_path, text):
    (tmp_path / "README.md").write_text(text)
    assert known_license(str(tmp_path)) is None
