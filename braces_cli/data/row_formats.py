"""What a row means, told by its keys or by `--columns`.

`text` is scored whole; of `prompt` + `completion`, and of `instruction` + `output` (with an optional `input`), only the
second part is scored; of `messages` only what the assistant says.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from braces_cli.core.utils.errors import ConfigError, DataError, near_misses
from braces_cli.data.readers import Source


@dataclass(frozen=True)
class Format:
    """A kind of row: the keys that it must have, and those that it may."""

    name: str
    needed: tuple[str, ...]
    optional: tuple[str, ...] = ()


TEXT = Format("text", ("text",))
PAIR = Format("prompt/completion", ("prompt", "completion"))
INSTRUCTION = Format("instruction/output", ("instruction", "output"), ("input",))
CHAT = Format("messages", ("messages",), ("tools",))
FORMATS = (TEXT, PAIR, INSTRUCTION, CHAT)
EXPECTED_COLUMNS = "`text`, `prompt` and `completion`, `instruction` and `output` (`input` optional), or `messages`"
CONDITION_KEYS = ("attribute", "strength")


@dataclass(frozen=True)
class Columns:
    """What `--columns` says.

    Attributes:
        content: key of a format -> column that stands for it; empty: rows are told by their keys.
        attribute: column of the attribute, None where it is not named.
        strength: column of the strength, None where it is not named.
    """

    content: Mapping[str, str] = field(default_factory=dict)
    attribute: str | None = None
    strength: str | None = None


def parse_columns(values: Sequence[str]) -> Columns:
    """`KEY=COLUMN[,KEY=COLUMN...]` of each value.

    Raises:
        ConfigError: no such form, an unknown key, a key named twice, or keys that are no format's.
    """
    named: dict[str, str] = {}
    known = [key for kind in FORMATS for key in (*kind.needed, *kind.optional)] + list(CONDITION_KEYS)
    for part in (part for value in values for part in value.split(",")):
        key, equals, column = (piece.strip() for piece in part.partition("="))
        if not (key and equals and column):
            raise ConfigError(f"`{part}` is not KEY=COLUMN", where="--columns", hint="Such as prompt=question.")
        if key not in known:
            hint = near_misses(key, known) or f"Keys: {', '.join(known)}."
            raise ConfigError(f"no format has a key `{key}`", where="--columns", hint=hint)
        if key in named:
            raise ConfigError(f"`{key}` is named twice", where="--columns", hint="Give one column for each key.")
        named[key] = column
    conditions = {key: named.pop(key, None) for key in CONDITION_KEYS}
    if named and not any(_fits(kind, named) for kind in FORMATS):
        raise ConfigError(
            f"{_list(named)} is not a complete format", where="--columns", hint=f"Name those of {EXPECTED_COLUMNS}."
        )
    return Columns(named, **conditions)


def _fits(kind: Format, keys: Iterable[str]) -> bool:
    """These keys are exactly one format's."""
    return set(kind.needed) <= set(keys) <= {*kind.needed, *kind.optional}


class FormatReader:
    """Tells what each row of one file is, and holds all of them to the same format."""

    def __init__(self, columns: Mapping[str, str] | None = None) -> None:
        self._columns = columns or {}
        self._seen: Format | None = None

    def read(self, row: Source) -> tuple[Format, dict[str, Any]]:
        """Format of a row and the values of its keys, those that are missing left out.

        Raises:
            DataError: the keys fit no format, several, or another one than the rows before.
        """
        found = self._mapped(row) if self._columns else detect(row)
        kind, fields = found
        if self._seen is not None and kind != self._seen:
            message = f"this row is {kind.name}, those before it are {self._seen.name}"
            raise DataError(message, where=row.where, hint="Put each format into its own file, or give --columns.")
        self._seen = kind
        return kind, fields

    def _mapped(self, row: Source) -> tuple[Format, dict[str, Any]]:
        kind = next(kind for kind in FORMATS if _fits(kind, self._columns))
        for key, column in self._columns.items():
            if column not in row.fields and key in kind.needed:
                hint = near_misses(column, map(str, row.fields)) or "Check --columns."
                raise DataError(f"no column `{column}` (keys found: {_list(row.fields)})", where=row.where, hint=hint)
        return kind, {key: row.fields[column] for key, column in self._columns.items() if column in row.fields}


def detect(row: Source) -> tuple[Format, dict[str, Any]]:
    """Format of a row by its keys, and their values.

    Where files give every row every column, a column that is null says nothing.

    Raises:
        DataError: the keys fit no format, or several.
    """
    filled = {key for key, value in row.fields.items() if value is not None}
    fitting = [kind for kind in FORMATS if set(kind.needed) <= filled]
    # A row of nulls alone still tells what it was meant to be, and its fault is named when it is read.
    fitting = fitting or [kind for kind in FORMATS if set(kind.needed) <= set(row.fields)]
    if len(fitting) == 1:
        kind = fitting[0]
        return kind, {key: row.fields[key] for key in (*kind.needed, *kind.optional) if key in row.fields}
    if fitting:
        message = f"the keys fit {len(fitting)} formats: {', '.join(kind.name for kind in fitting)}"
        example = ",".join(f"{key}={key}" for key in fitting[-1].needed)
        raise DataError(message, where=row.where, hint=f"Say which one to use, such as --columns {example}.")
    raise DataError(
        f"the row has none of the needed fields (keys found: {_list(row.fields)})",
        where=row.where,
        hint=f"Expected: {EXPECTED_COLUMNS}; or name the columns, such as --columns text=COLUMN.",
    )


def text_of(fields: Mapping[str, Any], key: str, where: str) -> str:
    """A value that must be text; an `input` that is missing or null is empty.

    Raises:
        DataError: it is no text.
    """
    value = fields.get(key)
    if value is None and key == "input":
        return ""
    if not isinstance(value, str):
        raise DataError(f"`{key}` must be text, not {type(value).__name__}", where=where, hint="Fix the row.")
    return value


def parts(kind: Format, fields: Mapping[str, Any], where: str) -> tuple[str, str | None]:
    """(prompt, completion) of a row that is no chat; the completion is None where the whole text is scored."""
    if kind is TEXT:
        return text_of(fields, "text", where), None
    if kind is PAIR:
        return text_of(fields, "prompt", where), text_of(fields, "completion", where)
    prompt = instruction_prompt(text_of(fields, "instruction", where), text_of(fields, "input", where))
    return prompt, text_of(fields, "output", where)


def instruction_prompt(instruction: str, context: str = "") -> str:
    """The prompt that stands for an instruction row; the answer follows it."""
    given = f"### Input:\n{context}\n\n" if context.strip() else ""
    return f"### Instruction:\n{instruction}\n\n{given}### Response:\n"


def _list(keys: Iterable[Any]) -> str:
    return ", ".join(map(str, keys)) or "none"
