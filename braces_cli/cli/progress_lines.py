"""Progress as lines of a log, where stderr is no terminal: Slurm, CI, nohup. Light: the standard library only."""

from __future__ import annotations

import time
from collections.abc import Callable

# Seconds between two lines.
INTERVAL = 30.0


class ProgressLines:
    """A `Report` that writes a line every so often, and none for work that is done before the first one is due.

    Args:
        write: takes a line.
        interval: seconds between lines.
        clock: seconds since any moment.
    """

    def __init__(
        self,
        write: Callable[[str], object],
        interval: float = INTERVAL,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._write, self._interval, self._clock = write, interval, clock
        self._last = clock()
        self._name, self._began, self._first = "", self._last, 0

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        now = self._clock()
        name = stage.partition(":")[0]
        if name != self._name:
            # What is done already, as in a resumed run, says nothing about the speed.
            self._name, self._began, self._first = name, now, done
        if now - self._last < self._interval:
            return
        self._last = now
        self._write(f"{stage}, {self._place(now - self._began, done, total)}")

    def _place(self, seconds: float, done: int, total: int | None) -> str:
        if total is None:
            return f"{done:,} done in {seconds:,.0f} s"
        rate = (done - self._first) / seconds if seconds > 0 else 0.0
        left = f", about {(total - done) / rate:,.0f} s left" if rate > 0 and done < total else ""
        share = f" ({done / total:.0%})" if total else ""
        return f"{done:,} of {total:,}{share}{left}"
