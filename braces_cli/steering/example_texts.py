"""Texts that show an attribute, from a file."""

from __future__ import annotations

from pathlib import Path

from braces_cli.core.utils.errors import DataError
from braces_cli.data.readers import READABLE, read_rows
from braces_cli.data.row_formats import detect, parts


def read_texts(path: Path) -> list[str]:
    """Texts of a plain file, one a line, or of the rows of a data file (`text`, or prompt and completion as one).

    Raises:
        DataError: missing, not UTF-8, a broken row, or no text in it.
    """
    if path.suffix.lower() in READABLE:
        texts = ["".join(filter(None, parts(*detect(row), row.where))) for row in read_rows(str(path))]
    else:
        try:
            texts = path.read_text(encoding="utf-8-sig").splitlines()
        except FileNotFoundError as error:
            raise DataError("no such file", where=str(path), hint="Give a file with one text a line.") from error
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"cannot read: {error}", where=str(path), hint="Give UTF-8, one text a line.") from error
    texts = [text.strip() for text in texts if text.strip()]
    if not texts:
        raise DataError("no texts", where=str(path), hint="Give at least one.")
    return texts
