"""Names, paths and values inside Markdown: shown as they are, never read as markup. Light: no other libraries."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from braces_cli.core.text import escaped

_MARKUP = re.compile(r"[\\`*\[\]<>|#~&$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|!(?=\[)|(?<=:)//|@(?=\w)")


def text(value: Any) -> str:
    """A value as running text or as a cell of a table, on one line."""
    return _MARKUP.sub(lambda found: "".join(f"\\{character}" for character in found[0]), escaped(str(value)))


def code(value: Any) -> str:
    """A value as a code span, on one line; in a cell of a table, too."""
    # No backslash escapes a backtick or a bar inside a span: a longer fence, and `text` for what holds a bar.
    shown = escaped(str(value))
    if "|" in shown or not shown.strip():
        return text(shown)
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", shown)), default=0))
    space = " " if shown.startswith(("`", " ")) or shown.endswith(("`", " ")) else ""
    return f"{fence}{space}{shown}{space}{fence}"


def name(value: str) -> str:
    """What a model, an adapter or a file is called in a text for others: a path on this disk by its last part only.

    A hub id has two parts and stays as it is, unless there is a folder of that name.
    """
    path = Path(value)
    is_local = path.is_absolute() or value.startswith((".", "~")) or len(path.parts) > 2
    return path.name if is_local or _is_there(path) else value


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def words(command: Sequence[str]) -> list[str]:
    """The words of a command, paths on this disk by their last part only, those behind a `=` too."""
    return [_word(word) for word in command]


def _word(word: str) -> str:
    option, sign, value = word.partition("=")
    if sign and "/" not in option:
        return f"{option}={_word(value)}"
    return name(word) if "/" in word and not re.match(r"\w+://", word) else word
