"""Property tests, with as many examples as the hypothesis profile (`fast` or `thorough`, tests/conftest.py)."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from hypothesis import example, given
from hypothesis.strategies import SearchStrategy

# Seconds of CPU time after which an example counts as one that never ends.
_STUCK = 60


def fuzz(*strategies: SearchStrategy[Any], examples: tuple[tuple[Any, ...], ...] = ()) -> Callable[..., Any]:
    """Make a function of generated values a test; `examples` are earlier failures and run first."""

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        decorated = given(*strategies)(test)
        for values in reversed(examples):
            decorated = example(*values)(decorated)
        return decorated

    return decorate


def attempt(call: Callable[[], Any], *errors: type[BaseException]) -> tuple[Any, Any]:
    """Return (result of `call`, None), or (None, error) if `call` raises one of `errors`."""
    try:
        return call(), None
    except errors as error:
        return None, error


@contextmanager
def time_limit() -> Iterator[None]:
    """Fail an example that takes more CPU time than any input may take."""

    def stuck(number: int, frame: Any) -> None:
        raise AssertionError(f"an example took more than {_STUCK} seconds of CPU time")

    before = signal.signal(signal.SIGPROF, stuck)
    signal.setitimer(signal.ITIMER_PROF, _STUCK)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
