"""Rows -> tokenised examples: in memory, as a stream for data larger than memory, as statistics, and as pairs."""

import math
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path
from typing import Any

from braces_cli.core.attributes.directions import Pair, Passage
from braces_cli.core.errors import DataError, logger, near_misses
from braces_cli.core.files import value_hash
from braces_cli.core.models.tokenize import IGNORED, Encoded, encode, encode_chat, encode_text
from braces_cli.core.progress import Report, silent
from braces_cli.data.chats import read_chat
from braces_cli.data.rows import Columns, Format, Source, parts, read_format, read_rows

# Texts of CSV cells without a value.
_MISSING = frozenset(("NaN", "nan", "NA", "N/A", "n/a", "<NA>", "#N/A", "NULL", "null"))
# Dropped rows that are listed.
_SHOWN = 5


@dataclass(frozen=True)
class Condition:
    """Condition of a row: an attribute, None for neutral, and its strength s."""

    attribute: str | None
    strength: float
    where: str


@dataclass(frozen=True)
class Fields:
    """Columns of attribute and strength.

    Attributes:
        strength_named: the user named the column of the strength, so a file without it is an error.
    """

    attribute: str
    strength: str = "strength"
    strength_named: bool = False


@dataclass(frozen=True)
class Reading:
    """Conversion of rows to examples.

    Attributes:
        tokenizer: of the base.
        max_length: maximum tokens of an example.
        fields: columns of attribute and strength; None for training without attributes.
        columns: see `--columns`; empty: the format follows from the keys.
        streaming: download hub sets row by row.
        window: tokens of the model's context, to measure plain texts as in `encode_text`; None for training, where a
            text is cut to `max_length` and has an end token.
    """

    tokenizer: Any
    max_length: int
    fields: Fields | None = None
    columns: Columns = field(default_factory=Columns)
    streaming: bool = False
    window: int | None = None


@dataclass(frozen=True)
class Example:
    """One row, or a part of it (a turn of a chat, a window of a text), tokenised.

    Attributes:
        tokens: None if no token is scored, or the text is blank.
        condition: attribute and strength; None without attributes.
        format: name of the row's format.
        truncated: cut to the maximum length.
        where: location of the row.
        chat: the row is a chat.
        notes: conversions of the row.
        is_first: the first example of its row.
    """

    tokens: Encoded | None
    condition: Condition | None
    format: str = ""
    truncated: bool = False
    where: str = ""
    chat: bool = False
    notes: Sequence[str] = ()
    is_first: bool = True


@dataclass
class Counts:
    """Counts of rows.

    Attributes:
        rows: rows read.
        truncated: rows cut to the maximum length.
        dropped: rows without a scored token.
        dropped_at: locations of the first dropped rows.
        chat: some rows are chats.
        digest: hash of tokens, labels and conditions of the examples with a scored token, in their order.
        notes: conversion -> rows.
    """

    rows: int = 0
    truncated: int = 0
    dropped: int = 0
    chat: bool = False
    digest: str = ""
    dropped_at: list[str] = field(default_factory=list)
    notes: dict[str, int] = field(default_factory=dict)

    def add(self, example: Example) -> None:
        if example.tokens is not None:
            tokens, found = example.tokens, example.condition
            parts = [tokens.ids, tokens.labels, found and [found.attribute, found.strength]]
            self.digest = value_hash([self.digest, *parts])
        if not example.is_first:
            return
        self.rows += 1
        for text in example.notes:
            self.notes[text] = self.notes.get(text, 0) + 1
        self.truncated += example.truncated
        if example.tokens is None:
            self.dropped += 1
            if len(self.dropped_at) < _SHOWN:
                self.dropped_at.append(example.where)
        self.chat |= example.chat


@dataclass
class Examples:
    """Tokenised rows in memory.

    Attributes:
        items: examples with at least one scored token.
        conditions: condition of each item; None without attributes.
        counts: of all rows.
    """

    items: list[Encoded] = field(default_factory=list)
    conditions: list[Condition | None] = field(default_factory=list)
    counts: Counts = field(default_factory=Counts)


def conditioned(rows: Iterable[Source], fields: Fields, name: str) -> Iterator[tuple[Source, Condition]]:
    """Rows of the file or hub set `name` with their conditions.

    Raises:
        DataError: see `condition`; or no row has the strength column that the user named.
    """
    columns: dict[str, None] = {}
    for row in rows:
        columns.update(dict.fromkeys(map(str, row.fields)))
        yield row, condition(row, fields)
    if fields.strength_named and columns and fields.strength not in columns:
        hint = near_misses(fields.strength, columns) or f"Keys found: {', '.join(columns)}."
        raise DataError(f"no row has a strength `{fields.strength}`", where=name, hint=hint)


def condition(row: Source, fields: Fields) -> Condition:
    """Attribute and strength of a row: `neutral`, empty and null are strength 0, a missing strength is 1.

    Raises:
        DataError: a missing column, a name that is not text, or a strength that is not a finite number.
    """
    if fields.attribute not in row.fields:
        hint = f"Keys found: {', '.join(map(str, row.fields))}."
        raise DataError(f"the row has no `{fields.attribute}`", where=row.where, hint=hint)
    name, strength = _cell(row, fields.attribute), _cell(row, fields.strength)
    if name is not None and not isinstance(name, str):
        raise DataError(f"`{fields.attribute}` must be a name, this is {name!r}", where=row.where, hint="Fix the row.")
    if name is None or name.strip() in ("", "neutral"):
        return Condition(None, 0.0, row.where)
    try:
        value = 1.0 if strength is None else float(strength)
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        what = f"`{fields.strength}` must be a number, this is {strength!r}"
        raise DataError(what, where=row.where, hint="Fix the row.")
    return Condition(name.strip(), value, row.where)


def _cell(row: Source, key: str) -> Any:
    """Value of a cell; None for a blank and a word for no value if all values are text."""
    value = row.fields.get(key)
    return None if row.untyped and (value or "").strip() in ("", *_MISSING) else value


def iterate(names: Sequence[str], how: Reading) -> Iterator[Example]:
    """Rows of several files or hub sets, encoded one at a time, for training or measuring as `how` describes.

    Raises:
        DataError: a row of an unknown format, of another format than the rows before it, or with invalid values.
    """
    for name in names:
        seen: Format | None = None
        rows = read_rows(name, streaming=how.streaming)
        # Conditions of dropped rows are checked, too.
        for row, found in ((row, None) for row in rows) if how.fields is None else conditioned(rows, how.fields, name):
            kind, fields = read_format(row, how.columns.content)
            if seen is not None and kind != seen:
                message = f"this row is {kind.name}, those before it are {seen.name}"
                raise DataError(message, where=row.where, hint="Put each format into its own file, or give --columns.")
            seen = kind
            chat = read_chat(kind, fields, row.where)
            if chat is not None:
                encoded, notes = encode_chat(how.tokenizer, chat, row.where, how.max_length)
                notes += chat.notes
            else:
                prompt, completion = parts(kind, fields, row.where)
                if how.window is not None and completion is None:
                    encoded = encode_text(how.tokenizer, prompt, how.window)
                else:
                    encoded = [encode(how.tokenizer, prompt, completion, end=True, max_length=how.max_length)]
                blank = not (prompt if completion is None else completion).strip()
                if row.untyped:
                    blank |= any(part is not None and part.strip() in _MISSING for part in (prompt, completion))
                encoded, notes = [] if blank else encoded, [kind.note] if kind.note else []
            truncated = any(tokens.truncated for tokens in encoded)
            kept = [tokens for tokens in encoded if tokens.scored]
            first = kept[0] if kept else None
            yield Example(first, found, kind.name, truncated, row.where, chat is not None, notes)
            for tokens in kept[1:]:
                yield Example(tokens, found, kind.name, where=row.where, is_first=False)


def read_examples(names: Sequence[str], how: Reading, report: Report = silent) -> Examples:
    """Read and tokenise several files or hub sets, in this order; rows without a scored token are dropped.

    Raises:
        DataError: a file or a row cannot be read, or no row has a scored token.
    """
    found = Examples()
    counts = found.counts
    for example in iterate(names, how):
        counts.add(example)
        if example.tokens is not None:
            found.items.append(example.tokens)
            found.conditions.append(example.condition)
        if counts.rows % 256 == 0:
            report("reading", counts.rows, None)
    report("reading", counts.rows, counts.rows)
    check_some(names, len(found.items), counts.rows)
    log_counts(counts, how.max_length)
    return found


def check_some(names: Sequence[str], kept: int, rows: int) -> None:
    """Raise a DataError if no row is left."""
    if not kept:
        hint = "Are the texts empty, or prompts longer than --max-length?"
        raise DataError(f"no row has a token to score ({rows} read)", where=", ".join(names), hint=hint)


def log_counts(counts: Counts, max_length: int) -> None:
    """Log the numbers of truncated and dropped rows."""
    if counts.truncated:
        logger.info("%d of %d rows were cut to %d tokens (--max-length)", counts.truncated, counts.rows, max_length)
    if counts.dropped:
        first = ", ".join(counts.dropped_at) + (", ..." if counts.dropped > len(counts.dropped_at) else "")
        logger.info("%d of %d rows have no text to score and were left out: %s", counts.dropped, counts.rows, first)
    for text, rows in counts.notes.items():
        logger.info("%d of %d rows: %s", rows, counts.rows, text)


# Examples in the shuffle buffer of a stream.
BUFFER = 4096
# Examples of a stream that are read before training, for probes and the hash of the rows.
HEAD = 256


class Stream:
    """Endless passes over the rows through a shuffle buffer; None fills the last global batch of a pass.

    The order is a function of seed and global batch only. The shuffle is not that of `datasets`, which would pickle the
    tokenizer for a fingerprint, and import datasets for plain files.

    Args:
        names: files or hub sets.
        seed: of the shuffle.
        global_batch: examples of an optimizer step, over all processes.

    Attributes:
        counts: of all passes so far, including rows read ahead; before the first pass, of the rows of `items`.
        conditions: the first condition of each attribute in the rows.
        items: tokens of the first examples, in the order of the files.

    Raises:
        DataError: a row cannot be read, here or later, or no row has a scored token.
    """

    def __init__(self, names: Sequence[str], how: Reading, seed: int, global_batch: int) -> None:
        self._names, self._how, self._seed, self._global_batch = names, how, seed, global_batch
        self.counts = Counts()
        self.items = [example.tokens for example in islice(self._kept(), HEAD) if example.tokens is not None]
        check_some(names, len(self.items), self.counts.rows)
        # Attributes must be known before training: one pass over the rows without tokenising.
        named: dict[str | None, Condition] = {}
        if how.fields is not None:
            for name in names:
                for _, found in conditioned(read_rows(name, streaming=how.streaming), how.fields, name):
                    named.setdefault(found.attribute, found)
        self.conditions = list(named.values())

    def __iter__(self) -> Iterator[Example | None]:
        self.counts = Counts()
        for epoch in count():
            draw = random.Random(f"{self._seed} {epoch}")
            buffer: list[Example] = []
            drawn = 0
            for example in self._kept():
                drawn += 1
                if len(buffer) < BUFFER:
                    buffer.append(example)
                    continue
                place = draw.randrange(BUFFER)
                example, buffer[place] = buffer[place], example
                yield example
            check_some(self._names, drawn, self.counts.rows)
            draw.shuffle(buffer)
            yield from buffer
            yield from [None] * (-drawn % self._global_batch)

    def _kept(self) -> Iterator[Example]:
        counts = self.counts
        for example in iterate(self._names, self._how):
            counts.add(example)
            if example.tokens is not None:
                yield example


SHOWN = 2
# Maximum tokens of a shown example.
SHOWN_TOKENS = 512


def check_rows(names: Sequence[str], how: Reading, report: Report = silent) -> dict[str, Any]:
    """Read and tokenise all rows, one at a time.

    Returns:
        `rows, examples, truncated, dropped, tokens, scored_tokens, max_length, lengths: {least, median, mean, most},
        formats: {name: rows}, attributes: {name: rows}, shown: [{where, parts: [{text, scored}]}], strengths:
        {attribute: {least, mean, most}}, dropped_at: [where], notes: {note: rows}`.

    Raises:
        DataError: a row cannot be read, or none has a scored token.
    """
    counts, formats, lengths, scored = Counts(), Counter[str](), Counter[int](), 0
    strengths: dict[str, list[float]] = {}
    shown: list[dict[str, Any]] = []
    for example in iterate(names, how):
        counts.add(example)
        formats[example.format] += example.is_first
        if example.condition is not None and example.is_first:
            strengths.setdefault(example.condition.attribute or "neutral", []).append(example.condition.strength)
        if counts.rows % 256 == 0:
            report("reading", counts.rows, None)
        if example.tokens is None:
            continue
        lengths[len(example.tokens.ids)] += 1
        scored += example.tokens.scored
        if len(shown) < SHOWN:
            shown.append({"where": example.where, "parts": decode_parts(how.tokenizer, example.tokens)})
    report("reading", counts.rows, counts.rows)
    check_some(names, lengths.total(), counts.rows)
    ranked = sorted(lengths.elements())
    least, most, tokens = ranked[0], ranked[-1], sum(ranked)
    median = ranked[(len(ranked) - 1) // 2]
    return {
        "rows": counts.rows,
        "examples": len(ranked),
        "truncated": counts.truncated,
        "dropped": counts.dropped,
        "tokens": tokens,
        "scored_tokens": scored,
        "max_length": how.max_length,
        "lengths": {"least": least, "median": median, "mean": tokens / len(ranked), "most": most},
        "formats": dict(formats),
        "attributes": {name: len(values) for name, values in strengths.items()},
        "shown": shown,
        "strengths": {
            name: {"least": min(values), "mean": sum(values) / len(values), "most": max(values)}
            for name, values in strengths.items()
        },
        "dropped_at": counts.dropped_at,
        "notes": counts.notes,
    }


def decode_parts(tokenizer: Any, tokens: Encoded) -> list[dict[str, Any]]:
    """Text of an example in scored and unscored parts, with special tokens."""
    ids = tokens.ids[:SHOWN_TOKENS]
    # The first token of a sequence is never scored.
    flags = [False, *(label != IGNORED for label in tokens.labels[1 : len(ids)])]
    starts = [index for index in range(len(ids)) if index == 0 or flags[index] != flags[index - 1]]

    def decode(part: list[int]) -> str:
        options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        return str(tokenizer.decode(part, **options)) if part else ""

    parts = []
    for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
        # Decoded with the tokens before it: decoded alone, some tokenizers drop a leading space.
        before, text = decode(ids[:start]), decode(ids[:end])
        text = text[len(before) :] if text.startswith(before) else decode(ids[start:end])
        parts.append({"text": text, "scored": flags[start]})
    if len(tokens.ids) > len(ids):
        parts.append({"text": f" ... ({len(tokens.ids) - len(ids)} more tokens)", "scored": False})
    return parts


_SIDES = ("positive", "negative")
_HINT = (
    'A row is {"positive": ..., "negative": ...}: texts, completions of the row\'s `prompt`, or objects with `prompt` '
    "and `completion`."
)


def read_pairs(path: Path) -> dict[str | None, list[Pair]]:
    """Pairs of a data file by the rows' `attribute`, None for rows without one.

    A `prompt` in the row belongs to both sides, which are then its completions.

    Raises:
        DataError: as `read_rows`, or a row without two different sides.
    """
    found: dict[str | None, list[Pair]] = {}
    for row in read_rows(str(path)):
        name = row.fields.get("attribute") or None
        if name is not None and not isinstance(name, str):
            raise DataError("`attribute` is not text", where=row.where, hint="It is the name of an attribute.")
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
