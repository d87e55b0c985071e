"""A file that exists and cannot be read is an error; the search does not continue elsewhere."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from braces_cli.core.adapter.files import find_adapter
from braces_cli.core.adapter.model import open_session
from braces_cli.core.attributes.files import TRAINED_FILE, list_attributes
from braces_cli.core.attributes.lookup import find_attribute
from braces_cli.core.errors import ConfigError, DataError, ModelError
from braces_cli.core.files import path_exists, user_path
from braces_cli.core.models.load import load_tokenizer
from braces_cli.core.options import LoadOptions


def loop(path: Path) -> None:
    path.symlink_to(path.name)


def broken_link(path: Path) -> None:
    path.symlink_to("nothing")


def folder(path: Path) -> None:
    path.mkdir()


def empty(path: Path) -> None:
    path.touch()


def pipe(path: Path) -> None:
    """Opening a pipe without a writer blocks forever."""
    os.mkfifo(path)


REASONS = "cannot read|no such|this is a folder|this is a pipe|the file is empty|the text is empty"
UNREADABLE = {make.__name__: make for make in (loop, broken_link, folder, empty, pipe)}


@pytest.fixture(params=UNREADABLE)
def make(request: pytest.FixtureRequest) -> Callable[[Path], None]:
    return UNREADABLE[request.param]


@pytest.mark.parametrize("link", [loop, broken_link])
def test_a_broken_link_exists(tmp_path: Path, link: Callable[[Path], None]) -> None:
    link(tmp_path / "a")
    assert path_exists(tmp_path / "a")


@pytest.mark.parametrize("name", ["a", "a" * 300, "a\0b", "file/a"])
def test_an_impossible_path_does_not_exist(tmp_path: Path, name: str) -> None:
    """A missing file, a name that is too long, a null character, and a path below a file."""
    (tmp_path / "file").touch()
    assert not path_exists(tmp_path / name)


def test_the_home_of_an_unknown_user_is_not_expanded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_path("~/a") == tmp_path / "a"
    assert user_path("~nobody-of-that-name/a") == Path("~nobody-of-that-name/a")


def test_an_attribute(session: Any, tmp_path: Path, make: Callable[[Path], None]) -> None:
    """The built-in list of the same name is not used."""
    make(tmp_path / "positive.safetensors")
    with pytest.raises(ModelError, match=REASONS):
        find_attribute(session, "positive", tmp_path)
    with pytest.raises(ModelError, match=REASONS):
        list_attributes(tmp_path, None)


@pytest.mark.parametrize("name", ["positive.safetensors", TRAINED_FILE])
def test_an_attribute_of_an_adapter(
    model_dir: Path, adapter_dir: Path, make: Callable[[Path], None], name: str
) -> None:
    """A file of one attribute, or of the attributes in training."""
    make(adapter_dir / name)
    session = open_session(str(model_dir), str(adapter_dir), LoadOptions(device="cpu"))
    with pytest.raises(ModelError, match=REASONS):
        find_attribute(session, "positive", None)
    with pytest.raises(ModelError, match=REASONS):
        list_attributes(None, adapter_dir)


def test_an_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], None]) -> None:
    """An adapter of that name on the hub is not used."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *args, **more: pytest.fail("the hub was called"))
    (tmp_path / "owner").mkdir()
    make(tmp_path / "owner" / "name")
    with pytest.raises(ModelError, match=r"no adapter here|no such adapter folder|cannot read"):
        find_adapter("owner/name")


def test_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], None]) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    make(tmp_path / "owner" / "name")
    with pytest.raises(ModelError, match=r"no model here|this is a file|cannot be read"):
        load_tokenizer("owner/name")


def test_rows_of_a_task(tmp_path: Path, make: Callable[[Path], None]) -> None:
    """Rows in `--task-data-dir`: another file of the task is not used."""
    from braces_cli.evaluation.run import check_settings
    from braces_cli.evaluation.settings import EvalSettings

    make(tmp_path / "perplexity.jsonl")
    (tmp_path / "perplexity.csv").write_text("text\na day\n")
    with pytest.raises(DataError):
        check_settings(EvalSettings(tasks=("perplexity",), task_data_dir=tmp_path))


def test_a_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], None]) -> None:
    from braces_cli.data.rows import read_rows

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **more: pytest.fail("the hub was called"))
    (tmp_path / "owner").mkdir()
    make(tmp_path / "owner" / "name")
    with pytest.raises(DataError):
        next(iter(read_rows("owner/name")))


def test_a_settings_file(braces: Any, tmp_path: Path, make: Callable[[Path], None]) -> None:
    """An empty file is valid."""
    make(tmp_path / "a.yaml")
    outcome = braces("recipe", "list", "--config", tmp_path / "a.yaml")
    assert (outcome.code == 2) == (make is not empty), outcome.err


def test_an_attributes_folder(tmp_path: Path) -> None:
    loop(tmp_path / "attributes")
    with pytest.raises(ConfigError, match="cannot read this folder"):
        list_attributes(tmp_path / "attributes", None)


def test_the_name_of_an_adapter_is_too_long() -> None:
    with pytest.raises(ModelError, match="no such adapter folder"):
        find_adapter("a" * 300)
