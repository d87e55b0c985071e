"""Rows of files and hub sets, their formats, and plain texts.

The format of a row follows from its keys or from `--columns`. `text` is scored as a whole; of `prompt` and
`completion`, and of `instruction` and `output` (with an optional `input`), only the second part is scored; of
`messages` only the assistant's turns. Imports no torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from braces_cli.core.errors import ConfigError, DataError, near_misses
from braces_cli.core.files import check_regular, file_hint, path_exists, user_path
from braces_cli.core.models.hub import hub_errors
from braces_cli.core.schema import ROW, Malformed, decode, parse

# Files of rows with keys; and all files of rows, where a line of text is a row with the key `text`.
STRUCTURED = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
READABLE = (*STRUCTURED, ".txt")


@dataclass(frozen=True)
class Source:
    """One row of a file or hub set.

    Attributes:
        fields: column name -> value.
        where: `file:line`, or `file, row N` if the format has no lines.
        untyped: all values are text, also missing ones, as in CSV.
    """

    fields: dict[str, Any]
    where: str
    untyped: bool = False


def read_rows(name: str, *, streaming: bool = False) -> Iterator[Source]:
    """Rows of a file, or of a hub set (`id`, `id:split` or `id:subset:split`; the split is `train` by default).

    Args:
        streaming: download a hub set row by row. Files other than `.json` are always read row by row.

    Raises:
        DataError: missing, empty, not UTF-8, broken (with its line), or of an unknown kind.
    """
    path = user_path(name)
    if (
        not path_exists(path)
        and not path.suffix
        and name.partition(":")[0].count("/") == 1
        and not name.startswith(".")
    ):
        return _never_empty(_hub(name, streaming), name)
    if not os.path.isfile(path):  # Path.is_file raises if the name is too long or the folder is not readable
        what = "this is a folder, not a file" if os.path.isdir(path) else "no such file"
        raise DataError(what, where=name, hint=f"Give a file ({', '.join(READABLE)}) or the id of a hub set.")
    if path.stat().st_size == 0:
        raise DataError("the file is empty", where=name, hint="Give a file with at least one row.")
    readers = {
        ".txt": _text_lines,
        ".jsonl": _json_lines,
        ".json": _json,
        ".csv": _csv,
        ".tsv": _csv,
        ".parquet": _parquet,
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"cannot read `{path.suffix or 'no'}` files", where=name, hint=f"Use {', '.join(READABLE)}.")
    return _never_empty(_decoded(reader(path), name), name)


def _never_empty(rows: Iterator[Source], name: str) -> Iterator[Source]:
    empty = True
    for row in rows:
        empty = False
        yield row
    if empty:
        raise DataError("no rows", where=name, hint="Give a file with at least one row.")


def _decoded(rows: Iterator[Source], name: str) -> Iterator[Source]:
    try:
        yield from rows
    except UnicodeDecodeError as error:
        raise DataError(
            f"not UTF-8 (byte {error.start})", where=name, hint="Convert it, for example with iconv."
        ) from error
    except OSError as error:
        raise DataError(f"cannot read: {error.strerror or error}", where=name, hint=file_hint(error)) from error


def _row(fields: Any, where: str) -> Source:
    if not isinstance(fields, dict):
        raise DataError(f"a row must be an object, this is a {type(fields).__name__}", where=where, hint="Fix the row.")
    return Source(fields, where)


def _json_lines(path: Path) -> Iterator[Source]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            yield _row(parse(ROW, line, where), where)


def _text_lines(path: Path) -> Iterator[Source]:
    """A row with the key `text` per line that is not blank."""
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield Source({"text": line.rstrip("\r\n")}, f"{path}:{number}")


def _json(path: Path) -> Iterator[Source]:
    text = path.read_text(encoding="utf-8-sig")
    try:
        value = decode(text)
    except Malformed as error:
        # Many `.json` files are JSON Lines: a complete object on the first line, followed by more.
        if error.end is not None and "\n" not in text[: error.end].strip():
            yield from _json_lines(path)
            return
        hint = "Write a list of objects, or one object per line."
        where = f"{path}:{error.line}" if error.line else str(path)
        raise DataError(error.message, where=where, hint=hint) from error
    if not isinstance(value, list):
        value = [value]
    for number, fields in enumerate(value, 1):
        yield _row(fields, f"{path}, row {number}")


def _csv(path: Path) -> Iterator[Source]:
    import csv

    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
        try:
            for fields in reader:
                where = f"{path}:{reader.line_num}"
                if None in fields or None in fields.values():
                    raise DataError("another number of cells than the header has", where=where, hint="Fix the row.")
                yield replace(_row(fields, where), untyped=True)
        except csv.Error as error:
            raise DataError(f"broken CSV: {error}", where=f"{path}:{reader.line_num}", hint="Fix the row.") from error


def _parquet(path: Path) -> Iterator[Source]:
    import pyarrow
    import pyarrow.parquet

    try:
        number = 0
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            for fields in batch.to_pylist():
                number += 1
                yield _row(fields, f"{path}, row {number}")
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"broken Parquet: {error}", where=str(path), hint="Write the file again.") from error


def _hub(name: str, streaming: bool) -> Iterator[Source]:
    from datasets import load_dataset

    repo, *rest = name.split(":")
    subset, split = (rest[0], rest[1]) if len(rest) > 1 else (None, rest[0] if rest else "train")
    with hub_errors(name, "data set", DataError):
        rows = load_dataset(repo, subset, split=split, streaming=streaming, trust_remote_code=False)
        # With streaming, any row can contact the hub.
        for number, fields in enumerate(rows, 1):
            yield _row(fields, f"{name}, row {number}")


@dataclass(frozen=True)
class Format:
    """A format of rows: its required and optional keys."""

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
    """`--columns`, parsed.

    Attributes:
        content: key of a format -> column; empty: the format follows from the keys of the rows.
        attribute: column of the attribute, None if not named.
        strength: column of the strength, None if not named.
    """

    content: Mapping[str, str] = field(default_factory=dict)
    attribute: str | None = None
    strength: str | None = None


def parse_columns(values: Sequence[str]) -> Columns:
    """`KEY=COLUMN[,KEY=COLUMN...]` of each value.

    Raises:
        ConfigError: another form, an unknown key, a key named twice, or keys that do not form a format.
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
    """Return True if these are the required and possibly optional keys of `kind`."""
    return set(kind.needed) <= set(keys) <= {*kind.needed, *kind.optional}


class FormatReader:
    """Read the rows of one file, which must all have the same format."""

    def __init__(self, columns: Mapping[str, str] | None = None) -> None:
        self._columns = columns or {}
        self._seen: Format | None = None

    def read(self, row: Source) -> tuple[Format, dict[str, Any]]:
        """Format of a row and the values of its keys, without missing keys.

        Raises:
            DataError: the keys fit no format, several formats, or another format than the rows before.
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
    """Format of a row by its keys, and their values; null columns are ignored, since some files have every column.

    Raises:
        DataError: the keys fit no format, or several formats.
    """
    filled = {key for key, value in row.fields.items() if value is not None}
    fitting = [kind for kind in FORMATS if set(kind.needed) <= filled]
    # A row of nulls: its keys determine the format, and reading a value reports the error.
    fitting = fitting or [kind for kind in FORMATS if set(kind.needed) <= set(row.fields)]
    if len(fitting) == 1:
        kind = fitting[0]
        return kind, {key: row.fields[key] for key in (*kind.needed, *kind.optional) if key in row.fields}
    if fitting:
        message = f"the keys fit {len(fitting)} formats: {', '.join(kind.name for kind in fitting)}"
        example = ",".join(f"{key}={key}" for key in fitting[-1].needed)
        raise DataError(message, where=row.where, hint=f"Choose one, such as with --columns {example}.")
    raise DataError(
        f"the row has none of the needed fields (keys found: {_list(row.fields)})",
        where=row.where,
        hint=f"Expected: {EXPECTED_COLUMNS}; or name the columns, such as --columns text=COLUMN.",
    )


def text_of(fields: Mapping[str, Any], key: str, where: str) -> str:
    """A text value; a missing or null `input` is empty.

    Raises:
        DataError: the value is not text.
    """
    value = fields.get(key)
    if value is None and key == "input":
        return ""
    if not isinstance(value, str):
        raise DataError(f"`{key}` must be text, not {type(value).__name__}", where=where, hint="Fix the row.")
    return value


def parts(kind: Format, fields: Mapping[str, Any], where: str) -> tuple[str, str | None]:
    """(prompt, completion) of a text, prompt or instruction row; no completion if the whole text is scored."""
    if kind is TEXT:
        return text_of(fields, "text", where), None
    if kind is PAIR:
        return text_of(fields, "prompt", where), text_of(fields, "completion", where)
    prompt = instruction_prompt(text_of(fields, "instruction", where), text_of(fields, "input", where))
    return prompt, text_of(fields, "output", where)


def instruction_prompt(instruction: str, context: str = "") -> str:
    """Prompt of an instruction row, which the answer follows."""
    given = f"### Input:\n{context}\n\n" if context.strip() else ""
    return f"### Instruction:\n{instruction}\n\n{given}### Response:\n"


def _list(keys: Iterable[Any]) -> str:
    return ", ".join(map(str, keys)) or "none"


def read_texts(path: Path, *, field: str | None = None) -> list[str]:
    """Texts of a plain file, one per line, or of the rows of a data file, without blank texts.

    Args:
        field: column of the text. None: rows of any format, prompt and completion as one text.

    Raises:
        DataError: missing, not UTF-8, a broken row, or no text in it.
    """
    if path.suffix.lower() in STRUCTURED:
        texts = [_text(row, field) for row in read_rows(str(path))]
    else:
        hint = "Give UTF-8, one text per line."
        check_regular(path, DataError, "Give a file with one text per line.")
        try:
            # Not `splitlines`, which also splits at form feeds and other characters.
            texts = path.read_text(encoding="utf-8-sig").split("\n")
        except UnicodeDecodeError as error:
            raise DataError(f"not UTF-8 (byte {error.start})", where=str(path), hint=hint) from error
        except OSError as error:
            raise DataError(f"cannot read: {error.strerror or error}", where=str(path), hint=hint) from error
    texts = [text for text in texts if text.strip()]
    if not texts:
        hint = "Give one text per line, or rows with `text`."
        raise DataError("all texts are blank", where=str(path), hint=hint)
    return texts


def _text(row: Source, field: str | None) -> str:
    if field is None:
        try:
            return "".join(filter(None, parts(*detect(row), row.where)))
        except DataError as error:
            hint = "Rename the column with the text to `text`, or give a file with one text per line."
            raise DataError(error.message, where=error.where, hint=hint) from error
    text = row.fields.get(field)
    if not isinstance(text, str):
        hint = f"Keys found: {', '.join(map(str, row.fields))}."
        raise DataError(f"the row has no text in `{field}`", where=row.where, hint=hint)
    return text
