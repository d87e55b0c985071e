"""Rows of files and hub sets, their formats, and plain texts.

The format of a row follows from its keys or from `--columns`. `text` is scored as a whole; of `prompt` and
`completion`, and of `instruction` and `output` (with an optional `input`), only the second part is scored; of
`messages` only the assistant's turns. Imports no torch.
"""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from braces_cli.core.errors import ConfigError, DataError, near_misses
from braces_cli.core.files import check_regular, file_hint, path_exists, user_path
from braces_cli.core.models.hub import hub_errors, is_hub_id
from braces_cli.core.schema import ROW, Malformed, decode, parse

# Files of rows with keys; and all files of rows, where a line of text is a row with the key `text`.
T = TypeVar("T")
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
    reader = _READERS.get(path.suffix.lower())
    repository, *_ = name.split(":")
    is_id = is_hub_id(repository) and Path(repository).suffix.lower() not in _READERS
    if is_id and not path_exists(path):
        rows = _hub(name, streaming)
    elif not os.path.isfile(path):  # Path.is_file raises if the name is too long or the folder is not readable
        what = "this is a folder, not a file" if os.path.isdir(path) else "no such file"
        raise DataError(what, where=name, hint=f"Give a file ({', '.join(READABLE)}) or the id of a hub set.")
    elif path.stat().st_size == 0:
        raise DataError("the file is empty", where=name, hint="Give a file with at least one row.")
    elif reader is None:
        raise DataError(f"cannot read `{path.suffix or 'no'}` files", where=name, hint=f"Use {', '.join(READABLE)}.")
    else:
        rows = reader(path)
    yield from reported(rows, name, "no rows", "Give a file with at least one row.")


def reported(rows: Iterable[T], where: str, nothing: str, hint: str) -> Iterator[T]:
    """Yield the rows; raise a DataError if the input is not UTF-8, cannot be read, or is empty (`nothing`)."""
    empty = True
    try:
        for row in rows:
            empty = False
            yield row
    except UnicodeDecodeError as error:
        convert = "Convert it, for example with iconv."
        raise DataError(f"not UTF-8 (byte {error.start})", where=where, hint=convert) from error
    except OSError as error:
        raise DataError(f"cannot read: {error.strerror or error}", where=where, hint=file_hint(error)) from error
    if empty:
        raise DataError(nothing, where=where, hint=hint)


def _row(fields: Any, where: str, untyped: bool = False) -> Source:
    if not isinstance(fields, dict):
        raise DataError(f"a row must be an object, this is a {type(fields).__name__}", where=where, hint="Fix the row.")
    return Source(fields, where, untyped)


def _lines(path: Path) -> Iterator[Source]:
    """A row per line that is not blank: a JSON object, or in a text file the value of the key `text`."""
    is_text = path.suffix.lower() not in (".jsonl", ".json")
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                where = f"{path}:{number}"
                yield _row({"text": line.rstrip("\r\n")} if is_text else parse(ROW, line, where), where)


def _json(path: Path) -> Iterator[Source]:
    text = path.read_text(encoding="utf-8-sig")
    try:
        value = decode(text)
    except Malformed as error:
        # Many `.json` files are JSON Lines: a complete object on the first line, followed by more.
        if error.end is not None and "\n" not in text[: error.end].strip():
            yield from _lines(path)
            return
        hint = "Write a list of objects, or one object per line."
        where = f"{path}:{error.line}" if error.line else str(path)
        raise DataError(error.message, where=where, hint=hint) from error
    for number, fields in enumerate(value if isinstance(value, list) else [value], 1):
        yield _row(fields, f"{path}, row {number}")


def _csv(path: Path) -> Iterator[Source]:
    import csv

    csv.field_size_limit(2**31 - 1)  # of a cell; by default 131,072 characters
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
        try:
            _check_columns(reader.fieldnames or (), f"{path}:1")
            for fields in reader:
                where = f"{path}:{reader.line_num}"
                if None in fields or None in fields.values():
                    raise DataError("another number of cells than the header has", where=where, hint="Fix the row.")
                yield _row(fields, where, untyped=True)
        except csv.Error as error:
            raise DataError(f"broken CSV: {error}", where=f"{path}:{reader.line_num}", hint="Fix the row.") from error


def _parquet(path: Path) -> Iterator[Source]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        _check_columns(file.schema_arrow.names, str(path))
        rows = (_decoded(fields, batch.schema) for batch in file.iter_batches() for fields in batch.to_pylist())
        for number, fields in enumerate(rows, 1):
            yield _row(fields, f"{path}, row {number}")
    except (pyarrow.ArrowException, OSError, Malformed) as error:
        raise DataError(f"broken Parquet: {error}", where=str(path), hint="Write the file again.") from error


def _decoded(value: Any, kind: Any) -> Any:
    """Value of an Arrow type with its JSON texts decoded: the type `Json` of `datasets`."""
    if value is None:
        return None
    if getattr(kind, "extension_name", None) == "arrow.json":
        return decode(value)
    if isinstance(value, dict):
        return {each.name: _decoded(value[each.name], each.type) for each in kind}
    if isinstance(value, list) and hasattr(kind, "value_type"):
        return [_decoded(item, kind.value_type) for item in value]
    return value


def _check_columns(names: Sequence[str], where: str) -> None:
    """Raise DataError if a column name is repeated: the last column would replace the others."""
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise DataError(f"two columns are named `{repeated[0]}`", where=where, hint="Rename or remove one of them.")


def _hub(name: str, streaming: bool) -> Iterator[Source]:
    from datasets import load_dataset

    repo, *rest = re.split(r":(?![^\[]*\])", name)  # not at the colon of a slice, such as `train[:10%]`
    subset, split = (rest[0], rest[1]) if len(rest) > 1 else (None, rest[0] if rest else "train")
    with hub_errors(name, "data set", DataError):
        rows = load_dataset(repo, subset, split=split, streaming=streaming, trust_remote_code=False)
        # With streaming, any row can contact the hub.
        for number, fields in enumerate(rows, 1):
            yield _row(fields, f"{name}, row {number}")


_READERS: dict[str, Callable[[Path], Iterator[Source]]] = {
    ".txt": _lines, ".jsonl": _lines, ".json": _json, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet,
}  # fmt: skip


@dataclass(frozen=True)
class Format:
    """A format of rows: its required and optional keys, and a note for the user."""

    name: str
    needed: tuple[str, ...]
    optional: tuple[str, ...] = ()
    note: str = ""


TEXT = Format("text", ("text",))
PAIR = Format("prompt/completion", ("prompt", "completion"), ("tools",))
INSTRUCTION = Format("instruction/output", ("instruction", "output"), ("input",))
CHAT = Format("messages", ("messages",), ("tools",))
FORMATS = (TEXT, PAIR, INSTRUCTION, CHAT)
# Formats of other programs, for rows that have none of the formats above.
CONVERSATIONS = Format("conversations", ("conversations",), ("system", "tools"))
PREFERENCE = Format(
    "preference", ("chosen", "rejected"), ("prompt", "tools"), "trained on `chosen`; `rejected` is not read"
)
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
        key, _, column = (piece.strip() for piece in part.partition("="))
        if not (key and column):
            raise ConfigError(f"`{part}` is not KEY=COLUMN", where="--columns", hint="Such as prompt=question.")
        if key not in known:
            hint = near_misses(key, known) or f"Keys: {', '.join(known)}."
            raise ConfigError(f"no format has a key `{key}`", where="--columns", hint=hint)
        if key in named:
            raise ConfigError(f"`{key}` is named twice", where="--columns", hint="Give one column for each key.")
        named[key] = column
    conditions = {key: named.pop(key, None) for key in CONDITION_KEYS}
    if named and not any(_fits(kind, named) for kind in FORMATS):
        hint = f"Name those of {EXPECTED_COLUMNS}."
        raise ConfigError(f"{_list(named)} is not a complete format", where="--columns", hint=hint)
    return Columns(named, **conditions)


def _fits(kind: Format, keys: Iterable[str]) -> bool:
    """Return True if these are the required and possibly optional keys of `kind`."""
    return set(kind.needed) <= set(keys) <= {*kind.needed, *kind.optional}


def read_format(row: Source, columns: Mapping[str, str]) -> tuple[Format, dict[str, Any]]:
    """Format of a row and the values of its keys, without missing keys.

    Args:
        columns: key -> column; empty: the format follows from the keys of the row. Then null values are ignored, since
            in some files every row has every column.

    Raises:
        DataError: the keys fit no format or several formats, or a column is missing.
    """
    if columns:
        kind = next(kind for kind in FORMATS if _fits(kind, columns))
        for key, column in columns.items():
            if column not in row.fields and key in kind.needed:
                hint = near_misses(column, map(str, row.fields)) or "Check --columns."
                raise DataError(f"no column `{column}` (keys found: {_list(row.fields)})", where=row.where, hint=hint)
        return kind, {key: row.fields[column] for key, column in columns.items() if column in row.fields}
    filled = {key for key, value in row.fields.items() if value is not None}
    # A row of nulls: its keys determine the format, and reading a value reports the error.
    for keys, kinds in ((filled, FORMATS), (filled, (CONVERSATIONS, PREFERENCE)), (set(row.fields), FORMATS)):
        if fitting := [kind for kind in kinds if set(kind.needed) <= keys]:
            break
    if len(fitting) == 1:
        kind = fitting[0]
        return kind, {key: row.fields[key] for key in (*kind.needed, *kind.optional) if key in row.fields}
    if fitting:
        message = f"the keys fit {len(fitting)} formats: {', '.join(kind.name for kind in fitting)}"
        example = ",".join(f"{key}={key}" for key in fitting[-1].needed)
        raise DataError(message, where=row.where, hint=f"Choose one, such as with --columns {example}.")
    message = f"the row has none of the needed fields (keys found: {_list(row.fields)})"
    hint = f"Expected: {EXPECTED_COLUMNS}; or name the columns, such as --columns text=COLUMN."
    raise DataError(message, where=row.where, hint=hint)


def parts(kind: Format, fields: Mapping[str, Any], where: str) -> tuple[str, str | None]:
    """(prompt, completion) of a text, prompt or instruction row; no completion if the whole text is scored.

    Raises:
        DataError: a value is not text; a missing or null `input` is empty.
    """
    if kind is PREFERENCE:
        fields, kind = {"prompt": fields.get("prompt"), "completion": fields["chosen"]}, PAIR
    texts: dict[str, Any] = {key: fields.get(key) for key in kind.needed}
    if kind is INSTRUCTION and fields.get("input") is not None:
        texts["input"] = fields["input"]
    for key, value in texts.items():
        if not isinstance(value, str):
            raise DataError(f"`{key}` must be text, not {type(value).__name__}", where=where, hint="Fix the row.")
    if kind is INSTRUCTION:
        return instruction_prompt(texts["instruction"], texts.get("input", "")), texts["output"]
    return (texts["text"], None) if kind is TEXT else (texts["prompt"], texts["completion"])


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
        texts: Iterable[str] = [_text(row, field) for row in read_rows(str(path))]
    else:
        check_regular(path, DataError, "Give a file with one text per line.")
        texts = (row.fields["text"] for row in _lines(path))
    hint = "Give one text per line, or rows with `text`."
    return list(reported((text for text in texts if text.strip()), str(path), "all texts are blank", hint))


def _text(row: Source, field: str | None) -> str:
    if field is None:
        try:
            return "".join(filter(None, parts(*read_format(row, {}), row.where)))
        except DataError as error:
            hint = "Rename the column with the text to `text`, or give a file with one text per line."
            raise DataError(error.message, where=error.where, hint=hint) from error
    text = row.fields.get(field)
    if not isinstance(text, str):
        hint = f"Keys found: {_list(row.fields)}."
        raise DataError(f"the row has no text in `{field}`", where=row.where, hint=hint)
    return text
