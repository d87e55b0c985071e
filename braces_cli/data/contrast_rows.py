"""Rows of two sides -> pairs of passages: `positive` and `negative`, each a text, or a prompt and its completion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from braces_cli.core.attributes.contrast import Pair, Passage
from braces_cli.core.utils.errors import DataError
from braces_cli.data.readers import Source, read_rows

_SIDES = ("positive", "negative")
_HINT = (
    'A row is {"positive": ..., "negative": ...}: texts, completions of a `prompt` beside them, or objects of `prompt` '
    "and `completion`."
)


def read_pairs(path: Path) -> dict[str | None, list[Pair]]:
    """Pairs of a data file, by the `attribute` that their rows name; None holds those of rows that name none.

    A `prompt` in the row belongs to both sides, which are then its completions.

    Raises:
        DataError: as `read_rows`, or a row without two sides that differ.
    """
    found: dict[str | None, list[Pair]] = {}
    for row in read_rows(str(path)):
        name = row.fields.get("attribute") or None
        if name is not None and not isinstance(name, str):
            raise DataError("`attribute` is no text", where=row.where, hint="It is the name of an attribute.")
        sides = [_passage(row, side) for side in _SIDES]
        if sides[0] == sides[1]:
            raise DataError("both sides are the same", where=row.where, hint="They should differ in the attribute.")
        found.setdefault(name, []).append(Pair(*sides))
    return found


def _passage(row: Source, side: str) -> Passage:
    value: Any = row.fields.get(side)
    prompt: Any = row.fields.get("prompt") or ""
    if isinstance(value, dict):
        prompt, value = value.get("prompt", ""), value.get("completion")
    if not isinstance(value, str) or not isinstance(prompt, str):
        raise DataError(f"no text in `{side}`", where=row.where, hint=_HINT)
    if not value.strip():
        raise DataError(f"`{side}` is blank", where=row.where, hint=_HINT)
    return Passage(value, prompt)
