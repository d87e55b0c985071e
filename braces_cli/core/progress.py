"""Progress of long-running work, reported without knowing who draws it.

How long each stage takes before a command's main work begins, for the table that `--debug` shows.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

logger = logging.getLogger("braces")

# (stage, units done, units in all or None). The part of `stage` behind a colon may change as the work goes on.
Report = Callable[[str, int, int | None], None]


def silent(stage: str, done: int, total: int | None) -> None:
    """The Report that shows nothing."""


class Timings:
    """Wall-clock seconds of stages, in the order in which they first began."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.runs: dict[str, int] = {}
        self._started = time.perf_counter()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time the `with` block as `name`, added to what that stage has taken before."""
        self.seconds.setdefault(name, 0.0)
        self.runs[name] = self.runs.get(name, 0) + 1
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - start

    def log(self, title: str) -> None:
        """Log the table at level DEBUG, with what no stage accounts for."""
        if not logger.isEnabledFor(logging.DEBUG):
            return
        total = time.perf_counter() - self._started
        rows = [*self.seconds.items(), ("everything else", total - sum(self.seconds.values())), ("in all", total)]
        width = max(len(name) for name, _ in rows)
        logger.debug("%s:\n%s", title, "\n".join(f"  {name:{width}}  {seconds:8.3f} s" for name, seconds in rows))
