"""Results to stdout, everything else to stderr."""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from braces_cli.cli.progress_lines import ProgressLines
from braces_cli.cli.table_layout import layout
from braces_cli.core.utils.atomic_files import finite

if TYPE_CHECKING:
    from braces_cli.core.utils.progress import Report


# Characters of a line that goes to a file or a pipe.
_UNLIMITED = 100_000


def set_up(quiet: bool, debug: bool) -> None:
    """Point our log at stderr and keep the libraries' chatter away, unless debugging. Call before importing them."""
    logger = logging.getLogger("braces")
    logger.propagate = False
    if not logger.handlers:
        handler = _Stderr()
        handler.setFormatter(logging.Formatter("braces: %(message)s"))
        logger.addHandler(handler)
    logger.setLevel(logging.DEBUG if debug else logging.ERROR if quiet else logging.INFO)
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
        print(self.format(record), file=sys.stderr, flush=True)


def print_json(value: Any) -> None:
    """One JSON document, indented; numbers that JSON has not (infinite, NaN) become null."""
    sys.stdout.write(json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    sys.stdout.flush()


def print_json_lines(rows: Iterable[Any]) -> None:
    """One JSON object a line, each flushed as it comes, so that a pipe sees it at once."""
    for row in rows:
        sys.stdout.write(json.dumps(finite(row), ensure_ascii=False, allow_nan=False) + "\n")
        sys.stdout.flush()


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], keys: Collection[str] = ()) -> None:
    """A table on stdout; numbers are aligned right, and no text is read as markup.

    A table too wide for the terminal is printed in blocks of columns.

    Args:
        keys: columns that say what a row is and begin each block; none named: the first column.
    """
    from rich.table import Table
    from rich.text import Text

    rows = [list(row) for row in rows]
    texts = [[cell(value) for value in row] for row in rows]
    out = console()
    for block in layout([columns, *texts], out.width, [columns.index(key) for key in keys] or [0]):
        table = Table(title=title, title_justify="left", show_header=any(columns))
        title = ""
        for index, width in block.items():
            numeric = bool(rows) and all(isinstance(row[index], (int, float)) or row[index] is None for row in rows)
            right: Literal["right", "left"] = "right" if numeric else "left"
            table.add_column(columns[index], justify=right, overflow="fold", width=width)
        for row in texts:
            table.add_row(*(Text(row[index]) for index in block))
        out.print(table)


def console(stderr: bool = False) -> Any:
    """A Rich console on stdout or stderr; where that is no terminal, no line is wrapped.

    It treats a reader who has gone as any write does; Rich itself would exit with 1.
    """
    from rich.console import Console

    class Plain(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

    out = Plain(stderr=stderr, highlight=False)
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
        (labels.get(name, name.replace("_", " ")), ", ".join(map(cell, value)) if isinstance(value, list) else value)
        for name, value in pairs.items()
        if value is not None and value not in ([], {}, ())
    ]
    print_table(title, ["", ""], shown)


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
    """Give a `Report` that draws one bar a stage on stderr, or writes lines now and then where that is no terminal."""
    from braces_cli.core.utils.progress import silent

    if quiet or not sys.stderr.isatty():
        yield silent if quiet else ProgressLines(logging.getLogger("braces").info)
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

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # Rich would send what is printed meanwhile to the bar's own stream: right on one terminal, but not past a pipe.
    both = sys.stdout.isatty()
    with Progress(
        *columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True, redirect_stdout=both
    ) as bars:
        tasks: dict[str, Any] = {}

        def report(stage: str, done: int, total: int | None) -> None:
            # What follows a colon changes as the work goes on (a loss, say); what stands before it names the bar.
            name = stage.partition(":")[0]
            if name not in tasks:
                tasks[name] = bars.add_task(stage, total=total)
            bars.update(tasks[name], description=stage, completed=done, total=total)

        yield report
