"""Progress of long-running work, reported without knowing who draws it."""

from __future__ import annotations

from collections.abc import Callable

# (stage, units done, units in all or None). The part of `stage` behind a colon may change as the work goes on.
Report = Callable[[str, int, int | None], None]


def silent(stage: str, done: int, total: int | None) -> None:
    """The Report that shows nothing."""
