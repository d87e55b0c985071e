"""Results on stdout; progress, logs and errors on stderr.

Every output goes through this module, which escapes control characters, cuts long values and reads no name as markup.
JSON keeps every character, escaped as JSON does.
"""

import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from braces_cli.core.files import finite
from braces_cli.core.progress import Report, silent
from braces_cli.core.text import escaped, json_escaped, number, one_line

# Characters of a line in a file or a pipe, of a table cell and of a log line.
_UNLIMITED = 100_000
_CELL = 2_000
_LOG = 700
_SECONDS_BETWEEN_LINES = 30.0
# Control characters that are kept in generated text, prompts and tracebacks.
_LAYOUT = "\n\t"


def note(text: str, keep: str = "\n") -> None:
    """Write lines to stderr; errors of stderr are ignored.

    Args:
        keep: control characters that are not escaped.
    """
    with suppress(OSError, ValueError):
        print(escaped(text, keep), file=sys.stderr, flush=True)


def set_up(quiet: bool, debug: bool) -> None:
    """Log to stderr, and silence libraries unless `debug`. Call before the libraries are imported."""
    logger = logging.getLogger("braces")
    logger.propagate = False
    if not logger.handlers:
        handler = _Stderr()
        handler.setFormatter(logging.Formatter("braces: %(message)s"))
        logger.addHandler(handler)
    logger.setLevel(logging.DEBUG if debug else logging.ERROR if quiet else logging.INFO)
    logging.lastResort = _Stderr(logging.WARNING)
    if debug:
        return
    warnings.simplefilter("ignore")
    # Functions that an Apple GPU lacks run on the CPU.
    os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if quiet or not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")


class _Stderr(logging.Handler):
    """Write to the current sys.stderr, which a progress bar replaces for a while."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info or record.levelno <= logging.DEBUG:
            note(self.format(record), _LAYOUT)
        else:
            note(one_line(self.format(record), _LOG))


def print_json(value: Any, indent: int | None = 2) -> None:
    """Print one JSON document; NaN and infinity become null."""
    text = json.dumps(finite(value), indent=indent, ensure_ascii=False, allow_nan=False)
    _write(json_escaped(text) + "\n")


def print_json_lines(rows: Iterable[Any]) -> None:
    """Print one JSON object per line; each line is flushed at once."""
    for row in rows:
        print_json(row, None)


def print_text(text: str, end: str = "\n") -> None:
    """Print text with its line breaks and tabs."""
    _write(escaped(text, _LAYOUT) + end)


def _write(text: str) -> None:
    with _named():
        sys.stdout.write(text)
        sys.stdout.flush()


@contextmanager
def _named() -> Iterator[None]:
    """Name standard output in an error of the system."""
    try:
        yield
    except OSError as error:
        error.filename = "standard output"
        raise


def console() -> Any:
    """Return a Rich console on stdout; lines are not wrapped in a file or a pipe."""
    from rich.console import Console

    out = Console(highlight=False)
    if not out.is_terminal:
        out.width = _UNLIMITED
    return out


def rich_text(text: str, style: str = "") -> Any:
    """Return text for Rich without markup and emoji codes."""
    from rich.text import Text

    return Text(escaped(text, _LAYOUT), style)


def print_table(title: str | Sequence[str], columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print a table; columns of numbers are aligned right.

    Args:
        title: one line, or several.
    """
    from rich.table import Table

    rows = [list(row) for row in rows]
    lines = [one_line(line) for line in ([title] if isinstance(title, str) else title)]
    heading = rich_text("\n".join(lines), "table.title") if any(lines) else None
    table = Table(title=heading, title_justify="left", show_header=any(columns))
    for index, name in enumerate(columns):
        numeric = bool(rows) and all(isinstance(row[index], (int, float)) or row[index] is None for row in rows)
        table.add_column(rich_text(one_line(name)), justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(rich_text(escaped(cell(value), _LAYOUT, _CELL)) for value in row))
    with _named():
        console().print(table)


def print_pairs(title: str, pairs: dict[str, Any]) -> None:
    """Print a table of names and values without None and empty values.

    Args:
        labels: name -> label, if it is not the name with spaces.
    """
    shown = []
    for name, value in pairs.items():
        if value is None or value in ([], {}, ()):
            continue
        if isinstance(value, list):
            value = ", ".join(one_line(cell(item)) for item in value)
        elif isinstance(value, str):
            value = one_line(value)
        shown.append((name.replace("_", " "), value))
    print_table(title, ["", ""], shown)


def print_result(as_json: bool, title: str, result: dict[str, Any]) -> None:
    """Print a result as a JSON document or as a table of names and values."""
    if as_json:
        print_json(result)
    else:
        print_pairs(title, result)


def cell(value: Any) -> str:
    """Format a value for a table: four significant digits, thousands separated, a dash for None."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return number(value) if isinstance(value, float) else str(value)


@contextmanager
def progress(quiet: bool) -> Iterator[Report]:
    """Yield a `Report` that draws a bar per stage, or logs a line every 30 seconds if stderr is not a terminal."""
    from rich import progress as rich_progress
    from rich.console import Console

    last = time.monotonic()

    def log(stage: str, done: int, total: int | None) -> None:
        nonlocal last
        if time.monotonic() - last >= _SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            logging.getLogger("braces").info("%s, %s", stage, f"{done:,} of {total:,}" if total else f"{done:,} done")

    if quiet or not sys.stderr.isatty():
        yield silent if quiet else log
        return
    bars = rich_progress.Progress(
        rich_progress.TextColumn("{task.description}", markup=False),
        rich_progress.BarColumn(),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TimeElapsedColumn(),
        rich_progress.TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        # Rich redirects stdout to stderr, which is wrong for a pipe.
        redirect_stdout=sys.stdout.isatty(),
    )
    tasks: dict[str, Any] = {}

    def report(stage: str, done: int, total: int | None) -> None:
        # The text before a colon names the bar; the rest changes, such as a loss.
        stage = one_line(stage)
        name = stage.partition(":")[0]
        if name not in tasks:
            tasks[name] = bars.add_task(stage, total=total)
        bars.update(tasks[name], description=stage, completed=done, total=total)

    with bars:
        yield report
