"""Property tests for a fixed number of seconds: hypothesis runs round after round, each with a seed of its own.

The seed of a whole run is printed at its end; `BRACES_FUZZ_SEED` sets it, `BRACES_FUZZ_SECONDS` the seconds of a test.
"""

from __future__ import annotations

import functools
import os
import signal
import tempfile
import time
from collections.abc import Callable
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.configuration import set_hypothesis_home_dir
from hypothesis.strategies import SearchStrategy

SECONDS = float(os.environ.get("BRACES_FUZZ_SECONDS", "1.5"))
SEED = int(os.environ["BRACES_FUZZ_SEED"])  # set in tests/conftest.py, for all processes of pytest-xdist alike
# CPU seconds of one example: only what never ends, or takes exponential time, takes as long.
_STUCK = 20
_ROUND = 10

# Hypothesis keeps tables of characters there, and must not leave them in the checkout.
set_hypothesis_home_dir(tempfile.mkdtemp(prefix="hypothesis-"))


def fuzz(*strategies: SearchStrategy[Any], examples: tuple[tuple[Any, ...], ...] = ()) -> Callable[..., Any]:
    """Make a function of generated values a test; `examples` are cases that were once wrong, and run first."""

    def decorate(test: Callable[..., None]) -> Callable[[], None]:
        @functools.wraps(test)
        def timed(*values: Any, **named: Any) -> None:
            with _Watch():
                test(*values, **named)

        def body() -> None:
            for values in examples:
                timed(*values)
            end, number = time.monotonic() + SECONDS, 0
            while True:
                once = settings(
                    max_examples=_ROUND, deadline=None, database=None, derandomize=False, print_blob=False,
                    suppress_health_check=list(HealthCheck), phases=[Phase.generate, Phase.shrink],
                )  # fmt: skip
                try:
                    hypothesis.seed(SEED + number)(once(given(*strategies)(timed)))()
                except BaseException as error:
                    error.add_note(f"BRACES_FUZZ_SEED={SEED + number} begins with this case")
                    raise
                number += 1
                if time.monotonic() >= end:
                    return

        # Not `wraps`: pytest would ask for the generated values as fixtures.
        body.__name__, body.__doc__, body.__module__ = test.__name__, test.__doc__, test.__module__
        return body

    return decorate


def attempt(call: Callable[[], Any], *errors: type[BaseException]) -> tuple[Any, Any]:
    """(what `call` returns, None), or (None, the error) where it raises one of `errors`."""
    try:
        return call(), None
    except errors as error:
        return None, error


class _Watch:
    """Ends an example that takes more CPU time than any input should."""

    def __enter__(self) -> None:
        self._before = signal.signal(signal.SIGPROF, self._stuck)
        signal.setitimer(signal.ITIMER_PROF, _STUCK)

    def __exit__(self, *error: object) -> None:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, self._before)

    def _stuck(self, number: int, frame: Any) -> None:
        raise AssertionError(f"an example took more than {_STUCK} seconds of CPU time")
