"""Fixtures of the tests of exports."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from braces_cli.core.adapter.files import find_adapter
from braces_cli.core.options import LoadOptions
from braces_cli.export.run import Request
from braces_cli.export.slots import export_slots
from tests.conftest import make_adapter, tiny_model, tiny_tokenizer, verified_in_process


@pytest.fixture
def options() -> LoadOptions:
    return LoadOptions(device="cpu")


@pytest.fixture
def request_(model_dir: Path, adapter_dir: Path, options: LoadOptions, tmp_path: Path) -> Request:
    """Base and adapter."""
    return Request(str(model_dir), find_adapter(str(adapter_dir)), options, tmp_path / "out")


@pytest.fixture
def output_dir(session: Any, tmp_path: Path) -> Path:
    """Folder of an adapter of `model_dir` with relevance to the output."""
    return make_adapter(session, tmp_path / "adapter", relevance_to="output")


@pytest.fixture(scope="session")
def stored_slots(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with slots, not to be changed."""
    folder = tmp_path_factory.mktemp("slots") / "slots"
    with verified_in_process():
        export_slots(Request(str(model_dir), None, LoadOptions(device="cpu"), folder), 8)
    return folder


@pytest.fixture
def slots_dir(stored_slots: Path, tmp_path: Path, in_process: None) -> Path:
    """A base with slots."""
    return shutil.copytree(stored_slots, tmp_path / "slots")


@pytest.fixture
def other_base(tmp_path: Path) -> str:
    """The folder of a model with other weights than `model_dir`."""
    tiny_model("llama", seed=1, max_position_embeddings=128).save_pretrained(tmp_path / "other")
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    return str(tmp_path / "other")


def save_base(folder: Path, name: str, **settings: Any) -> str:
    """Save a tiny model with its tokenizer."""
    tiny_model(name, max_position_embeddings=128, **settings).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)
