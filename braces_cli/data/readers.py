"""Files and hub sets -> rows: JSON Lines, JSON, CSV, TSV, Parquet, text or a hub id, each with its place for errors."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from braces_cli.core.models.hub_errors import hub_errors
from braces_cli.core.schema import Malformed, decode
from braces_cli.core.utils.atomic_files import file_hint
from braces_cli.core.utils.errors import DataError
from braces_cli.core.utils.paths import path_exists, user_path

# Files of rows with keys; and those that rows are read from, a line of text being a row of `text`.
STRUCTURED = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
READABLE = (*STRUCTURED, ".txt")


@dataclass(frozen=True)
class Source:
    """One row as it was read.

    Attributes:
        fields: column name -> value.
        where: `file:line`, or `file, row N` where the format has no lines.
        untyped: the file holds text only, so that a missing value is written in letters, as in CSV.
    """

    fields: dict[str, Any]
    where: str
    untyped: bool = False


def read_rows(name: str, *, streaming: bool = False) -> Iterator[Source]:
    """Rows of a file, or of a hub set (`id`, `id:split` or `id:subset:split`; the split is `train` by default).

    Args:
        streaming: fetch a hub set row by row rather than whole. Files other than `.json` are always read row by row.

    Raises:
        DataError: missing, empty, not UTF-8, broken (with its line), or of a kind that cannot be read.
    """
    path = user_path(name)
    if (
        not path_exists(path)
        and not path.suffix
        and name.partition(":")[0].count("/") == 1
        and not name.startswith(".")
    ):
        return _never_empty(_hub(name, streaming), name)
    if not os.path.isfile(path):  # pathlib's would raise where the name is too long or the folder is closed
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
            f"not UTF-8 (byte {error.start})", where=name, hint="Convert it, with iconv for one."
        ) from error
    except OSError as error:
        raise DataError(f"cannot read: {error.strerror or error}", where=name, hint=file_hint(error)) from error


def _row(fields: Any, where: str) -> Source:
    if not isinstance(fields, dict):
        raise DataError(f"a row must be an object, this is a {type(fields).__name__}", where=where, hint="Fix the row.")
    return Source(fields, where)


def _json_lines(path: Path) -> Iterator[Source]:
    from braces_cli.core.schema import ROW, parse  # msgspec, which the names of columns do not need

    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            yield _row(parse(ROW, line, where), where)


def _text_lines(path: Path) -> Iterator[Source]:
    """A row with the key `text` for each line that is not blank."""
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield Source({"text": line.rstrip("\r\n")}, f"{path}:{number}")


def _json(path: Path) -> Iterator[Source]:
    text = path.read_text(encoding="utf-8-sig")
    try:
        value = decode(text)
    except Malformed as error:
        # Many a `.json` file is JSON Lines: a whole object on its first line, and more behind it.
        if error.end is not None and "\n" not in text[: error.end].strip():
            yield from _json_lines(path)
            return
        hint = "Write a list of objects, or one object a line."
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
        # With streaming, the hub is reached when the first row is read, or any later one.
        for number, fields in enumerate(rows, 1):
            yield _row(fields, f"{name}, row {number}")
