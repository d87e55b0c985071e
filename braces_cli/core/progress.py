"""Progress of long-running work."""

from collections.abc import Callable

# (stage, units done, total units or None). The part of `stage` after a colon can change.
Report = Callable[[str, int, int | None], None]


def silent(stage: str, done: int, total: int | None) -> None:
    """A `Report` without output."""
