"""Rows -> tokenised examples to train on or to score.

What a row means is told by its keys: `text` is scored whole; of `prompt` + `completion`, and of `instruction` +
`output` (with an optional `input`), only the second part is scored.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from braces_cli.core.encode import Encoded, encode
from braces_cli.core.errors import DataError
from braces_cli.core.progress import Report, silent
from braces_cli.data.rows import Source, read_rows

WANTED = "`text`, `prompt` and `completion`, or `instruction` and `output` (`input` optional)"


@dataclass(frozen=True)
class Condition:
    """What a row is conditioned on: an attribute, None for neutral, and its strength s."""

    attribute: str | None
    strength: float
    where: str


@dataclass(frozen=True)
class Fields:
    """Columns that rows carry their attribute and strength in."""

    attribute: str
    strength: str = "strength"


@dataclass
class Examples:
    """Tokenised rows and what became of the others.

    Attributes:
        items: examples with at least one scored token.
        rows: rows read.
        truncated: rows cut to the maximum length.
        dropped: rows without a scored token, left out of `items`.
        conditions: attribute and strength of each item, where rows carry them.
    """

    items: list[Encoded] = field(default_factory=list)
    conditions: list[Condition] = field(default_factory=list)
    rows: int = 0
    truncated: int = 0
    dropped: int = 0

    @property
    def tokens(self) -> int:
        return sum(len(item.ids) for item in self.items)


def parts(row: Source) -> tuple[str, str | None]:
    """(prompt, completion) of a row; the completion is None where the whole text is scored.

    Raises:
        DataError: the keys fit no known kind of row, or a value is no text.
    """
    fields = row.fields
    if "text" in fields:
        return _text(row, "text"), None
    if "prompt" in fields and "completion" in fields:
        return _text(row, "prompt"), _text(row, "completion")
    if "instruction" in fields and "output" in fields:
        return instruction_prompt(_text(row, "instruction"), _text(row, "input")), _text(row, "output")
    found = ", ".join(map(str, fields)) or "none"
    raise DataError(
        f"the row has none of the needed fields (keys found: {found})", where=row.where, hint=f"Wanted: {WANTED}."
    )


def instruction_prompt(instruction: str, context: str = "") -> str:
    """The prompt that stands for an instruction row; the answer follows it."""
    given = f"### Input:\n{context}\n\n" if context.strip() else ""
    return f"### Instruction:\n{instruction}\n\n{given}### Response:\n"


def condition(row: Source, fields: Fields) -> Condition:
    """Attribute and strength of a row: `neutral`, empty and null are strength 0, a missing strength is 1.

    Raises:
        DataError: no such column, a name that is no text, or a strength that is no finite number.
    """
    if fields.attribute not in row.fields:
        hint = f"Keys found: {', '.join(map(str, row.fields))}."
        raise DataError(f"the row has no `{fields.attribute}`", where=row.where, hint=hint)
    name, strength = row.fields[fields.attribute], row.fields.get(fields.strength)
    if name is not None and not isinstance(name, str):
        raise DataError(f"`{fields.attribute}` must be a name, this is {name!r}", where=row.where, hint="Fix the row.")
    if name is None or name.strip() in ("", "neutral"):
        return Condition(None, 0.0, row.where)
    try:
        value = 1.0 if strength is None else float(strength)
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise DataError(
            f"`{fields.strength}` must be a number, this is {strength!r}", where=row.where, hint="Fix the row."
        )
    return Condition(name.strip(), value, row.where)


def _text(row: Source, key: str) -> str:
    value = row.fields.get(key)
    if value is None and key == "input":
        return ""
    if not isinstance(value, str):
        raise DataError(f"`{key}` must be text, this is {type(value).__name__}", where=row.where, hint="Fix the row.")
    return value


def tokenise(
    rows: Iterable[Source], tokenizer: Any, max_length: int, report: Report = silent, fields: Fields | None = None
) -> Examples:
    """Encode rows with their end token, cut to `max_length` tokens; rows without a scored token are dropped."""
    found = Examples()
    for row in rows:
        prompt, completion = parts(row)
        found.rows += 1
        example = encode(tokenizer, prompt, completion, end=True, max_length=max_length)
        found.truncated += example.truncated
        empty = not (prompt if completion is None else completion).strip()
        if empty or example.scored == 0:
            found.dropped += 1
        else:
            found.items.append(example)
            if fields is not None:
                found.conditions.append(condition(row, fields))
        if found.rows % 256 == 0:
            report("reading", found.rows, None)
    report("reading", found.rows, found.rows)
    return found


def read_examples(
    names: Sequence[str], tokenizer: Any, max_length: int, report: Report = silent, fields: Fields | None = None
) -> Examples:
    """Read and tokenise several files or hub sets, in the order given.

    Raises:
        DataError: a file or a row cannot be read, or no row has a scored token.
    """
    found = tokenise((row for name in names for row in read_rows(name)), tokenizer, max_length, report, fields)
    if not found.items:
        raise DataError(
            f"no row has a token to score ({found.rows} read)",
            where=", ".join(names),
            hint="Are the texts empty, or prompts longer than --max-length?",
        )
    return found
