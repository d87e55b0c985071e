"""Exceptions for errors of the user, with their exit codes, and the logger of warnings and notes.

    BracesError          1   failed while running
    |- ConfigError       2   usage or configuration
    |- DataError         3   bad data
    `- ModelError        4   model or adapter cannot be loaded or does not fit

The command line reports every other exception as a bug.
"""

import difflib
import logging
from collections.abc import Iterable

logger = logging.getLogger("braces")


class BracesError(Exception):
    """An error with a place and a hint.

    Args:
        message: one sentence without a full stop.
        where: file, line, key or option.
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
    """Return `Did you mean a, b?` for similar known names, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"Did you mean {', '.join(close)}?" if close else ""


def first_line(error: BaseException, limit: int = 200) -> str:
    """Return the first non-blank line of an error's message, cut to `limit` characters, or the error's type.

    A line that ends with a colon is followed by the next one.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])[:limit]
