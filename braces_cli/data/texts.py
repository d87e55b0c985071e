"""Plain texts from a file: what shows an attribute, or what perplexity is measured on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from braces_cli.core.utils.errors import DataError
from braces_cli.core.utils.paths import check_regular
from braces_cli.data.readers import STRUCTURED, Source, read_rows
from braces_cli.data.row_formats import detect, parts


def read_texts(path: Path, *, field: str | None = None) -> list[str]:
    """Texts of a plain file, one a line, or of the rows of a data file; blank ones are left out.

    Args:
        field: of the rows, the one that holds the text. None: rows of any format, prompt and completion as one text.

    Raises:
        DataError: missing, not UTF-8, a broken row, or no text in it.
    """
    if path.suffix.lower() in STRUCTURED:
        texts = [_text(row, field) for row in read_rows(str(path))]
    else:
        texts = list(_lines(path))
    texts = [text for text in texts if text.strip()]
    if not texts:
        hint = "Give one text a line, or rows with `text`."
        raise DataError("no text but blanks", where=str(path), hint=hint)
    return texts


def _lines(path: Path) -> Iterator[str]:
    hint = "Give UTF-8, one text a line."
    check_regular(path, DataError, "Give a file with one text a line.")
    try:
        # Only line breaks end a text: `splitlines` would also split at form feeds and the like.
        yield from path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 (byte {error.start})", where=str(path), hint=hint) from error
    except OSError as error:
        raise DataError(f"cannot read: {error.strerror or error}", where=str(path), hint=hint) from error


def _text(row: Source, field: str | None) -> str:
    if field is None:
        try:
            return "".join(filter(None, parts(*detect(row), row.where)))
        except DataError as error:
            hint = "Rename the column with the text to `text`, or give a file with one text a line."
            raise DataError(error.message, where=error.where, hint=hint) from error
    text = row.fields.get(field)
    if not isinstance(text, str):
        hint = f"Keys found: {', '.join(map(str, row.fields))}."
        raise DataError(f"the row has no text in `{field}`", where=row.where, hint=hint)
    return text
