"""Fixtures of the tests of exports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from braces_cli.core.adapter.files import find_adapter
from braces_cli.core.options import LoadOptions
from braces_cli.export.run import Request, run
from braces_cli.export.slots import SlotsExport
from tests.conftest import tiny_model, tiny_tokenizer


@pytest.fixture
def options() -> LoadOptions:
    return LoadOptions(device="cpu")


@pytest.fixture
def request_(model_dir: Path, adapter_dir: Path, options: LoadOptions) -> Request:
    """Base and adapter."""
    return Request(str(model_dir), find_adapter(str(adapter_dir)), options)


@pytest.fixture
def unverified(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the process that verifies an export, which takes seconds."""
    measured = ("max_logit_difference", "relative_difference", "rounding", "adapter_effect", "effect_missing", "probes")
    for module in ("run", "lora"):
        monkeypatch.setattr(
            f"braces_cli.export.{module}.verify_export", lambda *args, **kwargs: dict.fromkeys(measured, 0.0)
        )


@pytest.fixture
def slots_dir(model_dir: Path, tmp_path: Path, options: LoadOptions, unverified: None) -> Path:
    """A base with slots."""
    run(SlotsExport(Request(str(model_dir), None, options), 8), tmp_path / "slots")
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
