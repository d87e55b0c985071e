"""Rows -> tokenised examples to train on or to score."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from braces_cli.core.models.tokenization import Encoded, encode
from braces_cli.core.utils.errors import DataError
from braces_cli.core.utils.progress import Report, silent
from braces_cli.data.chat_template import encode_chat
from braces_cli.data.readers import Source, read_rows
from braces_cli.data.row_formats import CHAT, Columns, FormatReader, parts

logger = logging.getLogger("braces")


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


@dataclass(frozen=True)
class Reading:
    """How rows become examples.

    Attributes:
        tokenizer: of the base.
        max_length: tokens of an example that are kept.
        fields: columns of attribute and strength; None: rows carry none.
        columns: which columns stand for which keys; empty: keys are taken as they are.
        streaming: fetch hub sets row by row rather than whole.
    """

    tokenizer: Any
    max_length: int
    fields: Fields | None = None
    columns: Columns = field(default_factory=Columns)
    streaming: bool = False


@dataclass(frozen=True)
class Example:
    """One row, tokenised.

    Attributes:
        tokens: what is trained on or scored; None where no token is scored, or the text is blank.
        condition: attribute and strength, where rows carry them.
        format: name of the row's format.
        truncated: it was cut to the maximum length.
        where: place of the row.
    """

    tokens: Encoded | None
    condition: Condition | None
    format: str = ""
    truncated: bool = False
    where: str = ""


@dataclass
class Counts:
    """What became of the rows.

    Attributes:
        rows: rows read.
        truncated: rows cut to the maximum length.
        dropped: rows without a scored token, left out.
        chat: some rows are chats, written by the tokenizer's template.
    """

    rows: int = 0
    truncated: int = 0
    dropped: int = 0
    chat: bool = False

    def add(self, example: Example) -> None:
        self.rows += 1
        self.truncated += example.truncated
        self.dropped += example.tokens is None
        self.chat |= example.format == CHAT.name


@dataclass
class Examples(Counts):
    """Tokenised rows and what became of the others.

    Attributes:
        items: examples with at least one scored token.
        conditions: attribute and strength of each item, where rows carry them.
    """

    items: list[Encoded] = field(default_factory=list)
    conditions: list[Condition] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return sum(len(item.ids) for item in self.items)

    def __getitem__(self, index: int) -> Example:
        return Example(self.items[index], self.conditions[index] if self.conditions else None)


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


def tokenise(rows: Iterable[Source], how: Reading) -> Iterator[Example]:
    """Encode the rows of one file, each with its end token, cut to the maximum length.

    Raises:
        DataError: a row fits no format, another one than those before it, or holds what cannot be read.
    """
    reader = FormatReader(how.columns.content)
    for row in rows:
        kind, fields = reader.read(row)
        if kind is CHAT:
            tokens = encode_chat(how.tokenizer, fields, row.where, how.max_length)
            blank = False
        else:
            prompt, completion = parts(kind, fields, row.where)
            tokens = encode(how.tokenizer, prompt, completion, end=True, max_length=how.max_length)
            blank = not (prompt if completion is None else completion).strip()
        # Even of a row that is dropped: a fault in it is a fault of the file.
        stands = None if how.fields is None else condition(row, how.fields)
        kept = None if blank or tokens.scored == 0 else tokens
        yield Example(kept, stands, kind.name, tokens.truncated, row.where)


def iterate(names: Sequence[str], how: Reading) -> Iterator[Example]:
    """Tokenised rows of several files or hub sets, one after the other, as they are read."""
    for name in names:
        yield from tokenise(read_rows(name, streaming=how.streaming), how)


def read_examples(names: Sequence[str], how: Reading, report: Report = silent) -> Examples:
    """Read and tokenise several files or hub sets, in the order given; rows without a scored token are dropped.

    Raises:
        DataError: a file or a row cannot be read, or no row has a scored token.
    """
    found = collect(iterate(names, how), report)
    check_some(names, len(found.items), found.rows)
    log_counts(found, how.max_length)
    return found


def collect(examples: Iterable[Example], report: Report = silent) -> Examples:
    """Those with a scored token, in memory, and counts of all."""
    found = Examples()
    for example in examples:
        found.add(example)
        if example.tokens is not None:
            found.items.append(example.tokens)
            if example.condition is not None:
                found.conditions.append(example.condition)
        if found.rows % 256 == 0:
            report("reading", found.rows, None)
    report("reading", found.rows, found.rows)
    return found


def check_some(names: Sequence[str], kept: int, rows: int) -> None:
    """Raise a DataError where no row is left."""
    if not kept:
        hint = "Are the texts empty, or prompts longer than --max-length?"
        raise DataError(f"no row has a token to score ({rows} read)", where=", ".join(names), hint=hint)


def log_counts(counts: Counts, max_length: int) -> None:
    """Log what was cut and what was left out."""
    if counts.truncated:
        logger.info("%d of %d rows were cut to %d tokens (--max-length)", counts.truncated, counts.rows, max_length)
    if counts.dropped:
        logger.info("%d of %d rows have no token to score and were left out", counts.dropped, counts.rows)
