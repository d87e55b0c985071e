"""What several tests of inspection need."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from braces_cli.core.adapter.model import Session
from braces_cli.core.models.ffn import find_ffns
from braces_cli.core.models.load import Base
from tests.conftest import tiny_model, tiny_tokenizer


@pytest.fixture(params=["cpu", "disk"])
def opened_twice(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str], tuple[Session, Session]]:
    """Makes two sessions over the same tiny model of an architecture: as it is, and with its weights kept elsewhere."""
    accelerate = pytest.importorskip("accelerate")

    def make(name: str) -> tuple[Session, Session]:
        plain, offloaded = (tiny_model(name, vocab_size=96) for _ in range(2))
        if request.param == "cpu":
            accelerate.cpu_offload(offloaded)
        else:
            accelerate.disk_offload(offloaded, str(tmp_path))
        assert next(offloaded.parameters()).is_meta
        return opened(plain), opened(offloaded)

    return make


def opened(model: Any) -> Session:
    """A session over a model, with the tiny tokenizer."""
    return Session(Base(model, tiny_tokenizer(), "tiny", None, None), find_ffns(model))
