"""How long work says how far it is, without knowing who draws it."""

from __future__ import annotations

from collections.abc import Callable

# (stage, units done, units in all or None). What follows a colon in `stage` may change as the work goes on.
Report = Callable[[str, int, int | None], None]


def silent(stage: str, done: int, total: int | None) -> None:
    """The Report that shows nothing."""
