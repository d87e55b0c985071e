"""Standard streams: UTF-8, control characters escaped, and a reader who may have closed the pipe.

Light: the standard library only.

Results to stdout, everything else to stderr: the one place that prints.

Whatever is printed goes through here, where control characters are escaped and long values cut, and where no name is
read as markup. JSON keeps every character, escaped as JSON does.
"""

from __future__ import annotations

import io
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Literal

from braces_cli.core.files import finite
from braces_cli.core.text import escaped, json_escaped, one_line, shortened

if TYPE_CHECKING:
    from braces_cli.core.progress import Report


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


# Characters of a line that goes to a file or a pipe; of a cell of a table; of a line of the log.
_UNLIMITED = 100_000
_CELL = 2_000
_LOG = 700
_SECONDS_BETWEEN_LINES = 30.0
# What text may hold that is shown as it is: generated text, prompts, several lines of our own.
_LAYOUT = "\n\t"


def set_up(quiet: bool, debug: bool) -> None:
    """Point our log at stderr and keep the libraries' chatter away, unless debugging. Call before importing them."""
    logger = logging.getLogger("braces")
    logger.propagate = False
    if not logger.handlers:
        handler = _Stderr()
        handler.setFormatter(logging.Formatter("braces: %(message)s"))
        logger.addHandler(handler)
    logger.setLevel(logging.DEBUG if debug else logging.ERROR if quiet else logging.INFO)
    # What libraries log without a handler of their own.
    logging.lastResort = _Stderr(logging.WARNING)
    if debug:
        return
    warnings.simplefilter("ignore")
    # torchao, where installed, is imported along with transformers and reports each kernel that it has no use for.
    for chatty in ("torchao", "torch.utils._pytree"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if quiet or not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")


class _Stderr(logging.Handler):
    """Writes to what stderr is by then: a progress bar takes its place for a while, and each test has its own."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info or record.levelno <= logging.DEBUG:
            note(self.format(record), _LAYOUT)
        else:
            note(one_line(self.format(record), _LOG))


def print_json(value: Any) -> None:
    """One JSON document, indented; numbers that JSON has not (infinite, NaN) become null."""
    _write(_json(value, indent=2))


def print_json_lines(rows: Iterable[Any]) -> None:
    """One JSON object a line, each flushed as it comes, so that a pipe sees it at once."""
    for row in rows:
        _write(_json(row))


def print_text(text: str, end: str = "\n") -> None:
    """Text on stdout, flushed; its own line breaks and tabs stay."""
    _write(escaped(text, _LAYOUT) + end)


def _json(value: Any, indent: int | None = None) -> str:
    text = json.dumps(finite(value), indent=indent, ensure_ascii=False, allow_nan=False)
    return json_escaped(text) + "\n"


def _write(text: str) -> None:
    with to_stdout():
        sys.stdout.write(text)
        sys.stdout.flush()


def rich_text(text: str, style: str = "") -> Any:
    """Text for Rich: read as neither markup nor emoji codes."""
    from rich.text import Text

    return Text(escaped(text, _LAYOUT), style)


def print_table(title: str | Sequence[str], columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A table on stdout; numbers are aligned right, and no text is read as markup.

    Args:
        title: of one line, or of several.
    """
    from rich.table import Table

    rows = [list(row) for row in rows]
    columns = [one_line(name) for name in columns]
    # Line by line, so that a line break in a name is escaped, and those between the lines stay.
    lines = [one_line(line) for line in ([title] if isinstance(title, str) else title)]
    heading = rich_text("\n".join(lines), "table.title") if any(lines) else None
    texts = [[shortened(escaped(cell(value), _LAYOUT), _CELL) for value in row] for row in rows]
    table = Table(title=heading, title_justify="left", show_header=any(columns))
    for index, name in enumerate(columns):
        numeric = bool(rows) and all(isinstance(row[index], (int, float)) or row[index] is None for row in rows)
        right: Literal["right", "left"] = "right" if numeric else "left"
        table.add_column(rich_text(name), justify=right, overflow="fold")
    for row in texts:
        table.add_row(*map(rich_text, row))
    console().print(table)


def console() -> Any:
    """A Rich console on stdout; where that is no terminal, no line is wrapped.

    It treats a reader who has gone as any write does; Rich itself would exit with 1.
    """
    from rich.console import Console

    class Plain(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

        def print(self, *objects: Any, **details: Any) -> None:
            with to_stdout():
                super().print(*objects, **details)

    out = Plain(highlight=False)
    if not out.is_terminal:
        out.width = _UNLIMITED
    return out


def print_pairs(title: str, pairs: dict[str, Any], labels: Mapping[str, str] | None = None) -> None:
    """A two-column table of names and values; what was not measured, and what is empty, is left out.

    Args:
        labels: what a name is called, where its own words with spaces will not do.
    """
    labels = labels or {}
    shown = [
        (
            labels.get(name, name.replace("_", " ")),
            ", ".join(map(_value, value)) if isinstance(value, list) else _short(value),
        )
        for name, value in pairs.items()
        if value is not None and value not in ([], {}, ())
    ]
    print_table(title, ["", ""], shown)


def _value(value: Any) -> str:
    return one_line(cell(value))


def _short(value: Any) -> Any:
    return one_line(value) if isinstance(value, str) else value


def file_size(count: int) -> str:
    """Bytes in the largest unit of 1,000 that leaves a number above 1."""
    size, units = float(count), ["bytes", "kB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{size:.3g} {units[0]}"


def cell(value: Any) -> str:
    """A value as a reader wants it: four significant digits, thousands separated, a dash for nothing."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) and abs(value) < 1e6 else str(value)


@contextmanager
def progress(quiet: bool) -> Iterator[Report]:
    """Give a `Report` that draws a bar for each stage, or logs a line now and then if stderr is not a terminal."""
    from braces_cli.core.progress import silent

    if quiet or not sys.stderr.isatty():
        yield silent if quiet else _log_lines()
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # Rich would send what is printed meanwhile to the bar's own stream: right on one terminal, but not past a pipe.
    both = sys.stdout.isatty()
    with Progress(
        *columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True, redirect_stdout=both
    ) as bars:
        tasks: dict[str, Any] = {}

        def report(stage: str, done: int, total: int | None) -> None:
            # What follows a colon changes as the work goes on (a loss, say); what stands before it names the bar.
            stage = one_line(stage)
            name = stage.partition(":")[0]
            if name not in tasks:
                tasks[name] = bars.add_task(stage, total=total)
            bars.update(tasks[name], description=stage, completed=done, total=total)

        yield report


def _log_lines() -> Report:
    """A `Report` for log files: at most one line every 30 seconds."""
    last = time.monotonic()

    def report(stage: str, done: int, total: int | None) -> None:
        nonlocal last
        if time.monotonic() - last >= _SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            logging.getLogger("braces").info("%s, %s", stage, f"{done:,} of {total:,}" if total else f"{done:,} done")

    return report
