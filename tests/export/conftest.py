"""Fixtures of the tests of exports."""

from __future__ import annotations

from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from braces_cli.core.adapter.files import find_adapter
from braces_cli.core.options import LoadOptions
from braces_cli.export.run import Request
from braces_cli.export.slots import export_slots
from braces_cli.export.verify_process import probe
from tests.conftest import tiny_model, tiny_tokenizer


@pytest.fixture
def options() -> LoadOptions:
    return LoadOptions(device="cpu")


@pytest.fixture
def request_(model_dir: Path, adapter_dir: Path, options: LoadOptions, tmp_path: Path) -> Request:
    """Base and adapter."""
    return Request(str(model_dir), find_adapter(str(adapter_dir)), options, tmp_path / "out")


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Verify exports in this process: starting another one takes seconds."""

    def run(call: list[str], **options: Any) -> CompletedProcess:
        probe(*call[-3:])
        return CompletedProcess(call, 0, "", "")

    monkeypatch.setattr("braces_cli.export.verify.subprocess.run", run)


@pytest.fixture
def slots_dir(model_dir: Path, tmp_path: Path, options: LoadOptions, in_process: None) -> Path:
    """A base with slots."""
    export_slots(Request(str(model_dir), None, options, tmp_path / "slots"), 8)
    return tmp_path / "slots"


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
