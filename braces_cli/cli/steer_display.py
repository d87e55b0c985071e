"""Steered texts on a terminal: a table that grows, one text as it comes, or two side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from braces_cli.cli.console import console, print_text, rich_text


def print_rows(rows: Iterable[dict[str, Any]]) -> None:
    """Rows of texts as a table, each line printed as it comes; the unsteered text stands before the steered one.

    Where stdout is no terminal, each text is on a line behind its name.
    """
    from rich import box
    from rich.table import Table

    out, header = console(), True
    for row in rows:
        names = ["prompt", *(["unsteered"] if "unsteered" in row else []), "text"]
        titles = [titled(row["attributes"]) if name == "text" and len(names) == 3 else name for name in names]
        if not out.is_terminal:
            for name, title in zip(names, titles, strict=True):
                print_text(f"{title}: {row[name].strip()}")
            print_text("")
            continue
        # One table a row, all of the same widths: whole ones would need all rows, and all memory.
        table = Table(box=box.SIMPLE_HEAD, show_header=header, show_edge=False, expand=True)
        for name, title in zip(names, titles, strict=True):
            table.add_column(rich_text(title), ratio=1 if name == "prompt" else 2, overflow="fold")
        table.add_row(*(rich_text(row[name].strip()) for name in names))
        out.print(table)
        out.print()
        header = False


def print_texts(rows: Iterable[dict[str, Any]]) -> None:
    """Prompts with their continuations and nothing else, an empty line behind each."""
    for row in rows:
        print_text(f"{row['prompt']}{row['text']}\n")


def titled(attributes: dict[str, float]) -> str:
    """What a steered text is steered by."""
    return ", ".join(f"{name} {s:+g}" for name, s in attributes.items()) or "steered by nothing"


class TextPrinter:
    """Prints one text after another as they are generated, each behind its prompt."""

    def __init__(self) -> None:
        self._request: Any = None

    def write(self, request: Any, piece: str) -> None:
        self._begin(request)
        print_text(piece, end="")

    def run(self, rows: Iterable[dict[str, Any]]) -> None:
        """Draw texts from `rows`, which call `write` meanwhile."""
        for row in rows:
            if self._request is None:  # nothing came, not even half a word
                _print_prompt(row["prompt"])
            print_text("\n")
            self._request = None

    def _begin(self, request: Any) -> None:
        if self._request is None:
            self._request = request
            _print_prompt(request.prompt)


def _print_prompt(prompt: str) -> None:
    out = console()
    if out.is_terminal:
        out.print(rich_text(prompt, "bold"), end="", soft_wrap=True)
    else:
        print_text(prompt, end="")


@contextmanager
def side_by_side(prompt: str, title: Callable[[], str]) -> Iterator[Callable[[str, str], None]]:
    """Yields what takes pieces of the unsteered and of the steered text, and draws both as they grow."""
    from rich import box
    from rich.live import Live
    from rich.table import Table

    texts = {"unsteered": "", "steered": ""}

    def table() -> Any:
        drawn = Table(box=box.SIMPLE_HEAD, expand=True, padding=(0, 1))
        for heading in ("unsteered", title()):
            drawn.add_column(rich_text(heading), ratio=1, overflow="fold")
        drawn.add_row(*(rich_text(prompt, "bold").append(rich_text(text, "not bold")) for text in texts.values()))
        return drawn

    with Live(table(), console=console(), auto_refresh=False, vertical_overflow="visible") as live:

        def write(side: str, piece: str) -> None:
            texts[side] += piece
            live.update(table(), refresh=True)

        yield write
