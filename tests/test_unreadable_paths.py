"""A file that exists and cannot be read is an error; the search does not continue elsewhere."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from braces_cli.core.adapter.files import find_adapter
from braces_cli.core.adapter.model import open_session
from braces_cli.core.attributes.files import TRAINED_FILE, list_attributes
from braces_cli.core.attributes.lookup import find_attribute
from braces_cli.core.errors import BracesError, ConfigError, DataError, ModelError
from braces_cli.core.files import path_exists, user_path
from braces_cli.core.models.load import load_tokenizer
from braces_cli.core.options import LoadOptions
from braces_cli.data.rows import read_rows
from braces_cli.evaluation.run import check_settings
from braces_cli.evaluation.settings import EvalSettings

# Opening a pipe without a writer blocks forever.
UNREADABLE: dict[str, Callable[[Path], object]] = {
    "loop": lambda path: path.symlink_to(path.name),
    "broken link": lambda path: path.symlink_to("nothing"),
    "folder": Path.mkdir,
    "empty": Path.touch,
    "pipe": os.mkfifo,
}
REASONS = "cannot read|cannot be read|no such|this is a |is empty|no adapter here|no model here|rows of perplexity"


def find_stored(session: Any) -> Any:
    """Look for an attribute in an adapter."""
    return find_attribute(open_session(session.base.name, "adapter", LoadOptions(device="cpu")), "positive", None)


# What is read -> its path in the current folder, the error, and the function that reads it. Elsewhere there are a
# built-in list of the same name, an adapter, a model or a data set on the hub, and another file of the task.
READERS: dict[str, tuple[str, type[BracesError], Callable[[Any], Any]]] = {
    "attribute": ("positive.safetensors", ModelError, lambda session: find_attribute(session, "positive", Path())),
    "list of attributes": ("positive.safetensors", ModelError, lambda session: list_attributes(Path(), None)),
    "attribute of an adapter": ("adapter/positive.safetensors", ModelError, find_stored),
    "list of an adapter": (f"adapter/{TRAINED_FILE}", ModelError, lambda _: list_attributes(None, Path("adapter"))),
    "attributes in training": (f"adapter/{TRAINED_FILE}", ModelError, find_stored),
    "adapter": ("owner/name", ModelError, lambda session: find_adapter("owner/name")),
    "model": ("owner/name", ModelError, lambda session: load_tokenizer("owner/name")),
    "data set": ("owner/name", DataError, lambda session: next(iter(read_rows("owner/name")))),
    "rows of a task": (
        "perplexity.jsonl", DataError,
        lambda session: check_settings(EvalSettings(tasks=("perplexity",), task_data_dir=Path())),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", UNREADABLE)
@pytest.mark.parametrize("reader", READERS)
def test_search_ends_at_an_unreadable_file(session, adapter_dir, tmp_path, monkeypatch, reader, kind):
    monkeypatch.chdir(tmp_path)
    for name in ("huggingface_hub.snapshot_download", "datasets.load_dataset"):
        monkeypatch.setattr(name, lambda *args, **more: pytest.fail("the hub was called"))
    (tmp_path / "owner").mkdir()
    (tmp_path / "perplexity.csv").write_text("text\na day\n")
    place, error, read = READERS[reader]
    UNREADABLE[kind](tmp_path / place)
    with pytest.raises(error, match=REASONS):
        read(session)


@pytest.mark.parametrize("kind", UNREADABLE)
def test_settings_file(braces: Any, tmp_path: Path, kind: str) -> None:
    """An empty file is valid."""
    UNREADABLE[kind](tmp_path / "a.yaml")
    outcome = braces("recipe", "list", "--config", tmp_path / "a.yaml")
    assert (outcome.code == 2) == (kind != "empty"), outcome.err


def test_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A broken link exists; an impossible path does not; the home of an unknown user is not expanded."""
    for kind in ("loop", "broken link"):
        UNREADABLE[kind](tmp_path / kind)
        assert path_exists(tmp_path / kind)
    (tmp_path / "file").touch()
    assert not any(path_exists(tmp_path / name) for name in ("a", "a" * 300, "a\0b", "file/a"))
    with pytest.raises(ConfigError, match="cannot read this folder"):
        list_attributes(tmp_path / "loop", None)
    with pytest.raises(ModelError, match="no such adapter folder"):
        find_adapter("a" * 300)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_path("~/a") == tmp_path / "a"
    assert user_path("~nobody-of-that-name/a") == Path("~nobody-of-that-name/a")
