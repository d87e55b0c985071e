"""Standard streams as they may be: closed, full, a pipe that nobody reads, in an encoding that lacks characters.

Light: the standard library only.
"""

from __future__ import annotations

import codecs
import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from braces_cli.core.utils.errors import ConfigError
from braces_cli.core.utils.plain_text import escaped


class _Closed(io.TextIOBase):
    """A standard output that the caller has closed: whoever writes to it learns so."""

    encoding = "utf-8"
    _used = False

    def write(self, text: str) -> int:
        self._used = True
        self.flush()
        return len(text)

    def flush(self) -> None:
        if self._used:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))


def open_streams() -> None:
    """Make the standard streams usable: what is closed is replaced, and no character is an error.

    A file that is opened later must not get the number of a closed stream: what libraries print would end up in it.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    # None is what Python makes of a stream that was closed before it started.
    if sys.stdin is None:
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115  (open for as long as the process lives)
    if sys.stdout is None:
        sys.stdout = _Closed()
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if isinstance(sys.stdin, io.TextIOWrapper):
        # Without a locale Python lets bytes through that are no text; files are read as UTF-8 wherever they are.
        ascii_only = codecs.lookup(sys.stdin.encoding).name == "ascii"
        sys.stdin.reconfigure(encoding="utf-8" if ascii_only else None, errors="strict")


def is_utf8() -> bool:
    """Whether standard output takes every character."""
    return codecs.lookup(getattr(sys.stdout, "encoding", None) or "utf-8").name == "utf-8"


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
    """A line or several on stderr. A stderr that is closed or full is no reason to fail.

    Args:
        keep: control characters that are not escaped; lines of one's own.
    """
    if sys.stderr is not None:  # print would take stdout
        with suppress(OSError, ValueError):
            print(escaped(text, keep), file=sys.stderr, flush=True)


def text_arguments(args: list[str]) -> list[str]:
    """The words of the command line as text, whatever the locale.

    Raises:
        ConfigError: one is not UTF-8.
    """
    texts = []
    for number, word in enumerate(args, 1):
        try:
            word.encode("utf-8")
        except UnicodeEncodeError:
            try:
                word = os.fsencode(word).decode("utf-8")
            except UnicodeError as error:
                hint = "Write it in UTF-8; rename a file whose name is not."
                raise ConfigError(f"`{word}` is not UTF-8", where=f"argument {number}", hint=hint) from error
        texts.append(word)
    return texts
