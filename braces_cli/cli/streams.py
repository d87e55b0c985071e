"""Standard streams: UTF-8, control characters escaped, and a reader who may have closed the pipe.

Light: the standard library only.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from braces_cli.core.utils.plain_text import escaped


def open_streams() -> None:
    """Use UTF-8 on all standard streams; an unpaired surrogate is escaped."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="strict")


@contextmanager
def to_stdout() -> Iterator[None]:
    """Around what is written to standard output: an error of the system names it.

    Raises:
        OSError: it is closed or full.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        error.filename = error.filename or "standard output"
        raise


def stdout_failure() -> OSError | None:
    """What writing to standard output fails with, once what is held back is written; None where nothing fails."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        return error
    return None


def discard_stdout() -> None:
    """Send what is still held back to nowhere: Python would try again when the process ends, and complain."""
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
    except (OSError, AttributeError, ValueError):
        sys.stdout = None


def note(text: str, keep: str = "\n") -> None:
    """Write one or several lines to stderr; a stderr that cannot be written to is ignored.

    Args:
        keep: control characters that are not escaped; lines of one's own.
    """
    with suppress(OSError, ValueError):
        print(escaped(text, keep), file=sys.stderr, flush=True)
