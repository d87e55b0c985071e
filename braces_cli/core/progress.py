"""Progress of long-running work, and the time of each stage for `--debug`."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

logger = logging.getLogger("braces")

# (stage, units done, total units or None). The part of `stage` after a colon can change.
Report = Callable[[str, int, int | None], None]


def silent(stage: str, done: int, total: int | None) -> None:
    """A `Report` without output."""


class Timings:
    """Wall-clock seconds of stages, in order of their first start."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.runs: dict[str, int] = {}
        self._started = time.perf_counter()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time of the `with` block to stage `name`."""
        self.seconds.setdefault(name, 0.0)
        self.runs[name] = self.runs.get(name, 0) + 1
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - start

    def log(self, title: str) -> None:
        """Log a table at level DEBUG, with the time outside of all stages."""
        if not logger.isEnabledFor(logging.DEBUG):
            return
        total = time.perf_counter() - self._started
        rows = [*self.seconds.items(), ("everything else", total - sum(self.seconds.values())), ("in all", total)]
        width = max(len(name) for name, _ in rows)
        logger.debug("%s:\n%s", title, "\n".join(f"  {name:{width}}  {seconds:8.3f} s" for name, seconds in rows))
