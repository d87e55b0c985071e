"""Sessions over models of several architectures."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from braces_cli.core.adapter.model import Session, attach
from braces_cli.core.models.load import Base
from braces_cli.inspection.vocabulary import LogitLens
from tests.conftest import open_gates, tiny_model, tiny_tokenizer


def opened(model: Any, *, adapter: bool = False, relevance_to: str = "input") -> Session:
    """A session over a model or an architecture's tiny model, with the tiny tokenizer; an adapter has open gates."""
    model = tiny_model(model, vocab_size=96) if isinstance(model, str) else model
    session = Session(Base(model, tiny_tokenizer(), "tiny"))
    if adapter:
        session.adapter = attach(model, 4, relevance_to=relevance_to)
        open_gates(session.adapter)
    return session


@pytest.fixture
def lens(session: Session) -> LogitLens:
    """The logit lens of the tiny Llama."""
    return LogitLens(session.base)


@pytest.fixture(params=["cpu", "disk"])
def opened_twice(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str], tuple[Session, Session]]:
    """Open the tiny model of an architecture twice: in memory, and offloaded to the CPU or the disk."""
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
