"""The errors a user can cause, each with its exit code.

    BracesError          1   failed while running
    |- ConfigError       2   usage or configuration
    |- DataError         3   bad data
    `- ModelError        4   model or adapter cannot be loaded or does not fit

Everything else that reaches the command line is a bug of ours and is reported as one.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class BracesError(Exception):
    """What went wrong, where, and what to do about it.

    Args:
        message: what is wrong, one sentence without a full stop.
        where: file, line or key that holds the fault.
        hint: what the user can do.
    """

    exit_code = 1

    def __init__(self, message: str, *, where: str | None = None, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.hint = hint

    def __str__(self) -> str:
        head = f"{self.where}: {self.message}" if self.where else self.message
        return f"{head}\n{self.hint}" if self.hint else head


class ConfigError(BracesError):
    """An option, a combination of options or a config file is wrong (exit code 2)."""

    exit_code = 2


class DataError(BracesError):
    """A data file is missing, broken or has the wrong fields (exit code 3)."""

    exit_code = 3


class ModelError(BracesError):
    """A model or an adapter cannot be loaded, or the two do not fit (exit code 4)."""

    exit_code = 4


def near_misses(name: str, known: Iterable[str]) -> str:
    """`Did you mean a, b?` for the known names that resemble `name`, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"Did you mean {', '.join(close)}?" if close else ""


def first_line(error: BaseException, limit: int = 200) -> str:
    """The first line of an error's message that is not blank, at most `limit` characters; else the error's type."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)[:limit]
