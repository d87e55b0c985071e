"""Prompts from options, a file or a pipe, one at a time, so that a file of any length fits in memory."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from braces_cli.core.errors import ConfigError, DataError
from braces_cli.core.files import file_hint
from braces_cli.core.schema import ROW, cut, parse
from braces_cli.data.rows import read_rows

# Files of rows that are no lines.
_TABLES = (".json", ".csv", ".tsv", ".parquet")
# Characters of a line: more than any model reads.
LONGEST = 10_000_000


@dataclass(frozen=True)
class PromptRow:
    """A prompt, and name -> strength of the attributes that its row names; None where it names none."""

    text: str
    attributes: Mapping[str, float] | None = None


def read_prompts(given: Sequence[str], file: Path | None, pipe: TextIO) -> Iterator[str]:
    """The texts of `read_prompt_rows`."""
    return (row.text for row in read_prompt_rows(given, file, pipe))


def read_prompt_rows(given: Sequence[str], file: Path | None, pipe: TextIO) -> Iterator[PromptRow]:
    """Prompts of `--prompt`, else of `--prompts FILE`, else of standard input (one a line, or JSON Lines).

    The file `-` is standard input.

    Raises:
        ConfigError: two sources, or none.
        DataError: the file is missing, empty, not UTF-8, or a line has no prompt, or attributes without strengths.
    """
    if given and file is not None:
        raise ConfigError("two sources of prompts", where="--prompt, --prompts", hint="Give one of them.")
    if given:
        return map(PromptRow, given)
    if file is not None and str(file) != "-":
        if not os.path.exists(file) or os.path.isdir(file):  # a pipe with a name will do
            raise DataError("no such file", where=str(file), hint="Give a text file with one prompt a line.")
        return _some(_file(file), str(file))
    if pipe.isatty() and file is None:
        raise ConfigError("no prompt", where="--prompt", hint="Give --prompt TEXT, --prompts FILE, or pipe one a line.")
    return _some(_lines(pipe, "standard input"), "standard input")


def _file(path: Path) -> Iterator[PromptRow]:
    if path.suffix.lower() in _TABLES:
        yield from (_prompt_row(row.fields, row.where, untyped=row.untyped) for row in read_rows(str(path)))
        return
    with path.open(encoding="utf-8-sig") as lines:
        yield from _lines(lines, str(path), path.suffix.lower() == ".jsonl")


def _some(prompts: Iterator[PromptRow], where: str) -> Iterator[PromptRow]:
    empty = True
    try:
        for prompt in prompts:
            empty = False
            yield prompt
    except UnicodeDecodeError as error:
        raise DataError(
            f"not UTF-8 (byte {error.start})", where=where, hint="Convert it, with iconv for one."
        ) from error
    except OSError as error:
        raise DataError(f"cannot read: {error.strerror or error}", where=where, hint=file_hint(error)) from error
    if empty:
        raise DataError("no prompts", where=where, hint="Give at least one line.")


def _lines(lines: TextIO, where: str, structured: bool | None = None) -> Iterator[PromptRow]:
    # Not `for raw in lines`: a device such as /dev/zero is a line without an end.
    for number, raw in enumerate(iter(lambda: lines.readline(LONGEST + 1), ""), 1):
        if len(raw) > LONGEST:
            hint = "Is this a text file? A prompt stands on one line."
            raise DataError(f"a line of more than {LONGEST:,} characters", where=f"{where}:{number}", hint=hint)
        line = raw.rstrip("\r\n")
        if not line.strip():
            continue
        if structured is None:
            # A pipe does not say what it carries; its first line does.
            structured = line.startswith('{"')
        if structured:
            yield _prompt_row(parse(ROW, line, f"{where}:{number}"), f"{where}:{number}")
        else:
            yield PromptRow(line)


def _prompt_row(row: Any, where: str, *, untyped: bool = False) -> PromptRow:
    """The prompt of a row; `untyped`: the file holds text only, and `attributes` are JSON in it."""
    prompt = row.get("prompt") if isinstance(row, dict) else None
    if isinstance(prompt, dict):  # as RealToxicityPrompts and its relatives nest it
        prompt = prompt.get("text")
    if not isinstance(prompt, str):
        keys = cut(", ".join(row)) if isinstance(row, dict) else type(row).__name__
        raise DataError(f"no `prompt` with text (keys found: {keys})", where=where, hint='Write {"prompt": "..."}.')
    attributes = row.get("attributes")
    if untyped and isinstance(attributes, str):
        attributes = parse(ROW, attributes, where) if attributes.strip() else None
    return PromptRow(prompt, _strengths(attributes, where))


def _strengths(value: Any, where: str) -> dict[str, float] | None:
    """What a row holds under `attributes`."""
    if value is None:
        return None
    numbers = list(value.values()) if isinstance(value, dict) else [None]
    if not all(isinstance(s, int | float) and not isinstance(s, bool) and math.isfinite(s) for s in numbers):
        hint = 'Write {"prompt": "...", "attributes": {"positive": 2}}.'
        raise DataError("`attributes` does not map names to strengths", where=where, hint=hint)
    return {name: float(s) for name, s in value.items()}


def attribute_names(file: Path) -> list[str]:
    """Attributes that the rows of a file name, so that an unknown one is an error before the first text.

    None of a pipe, which can be read only once.

    Raises:
        DataError: as `read_prompt_rows`.
    """
    if not file.is_file():
        return []
    return list(dict.fromkeys(name for row in _some(_file(file), str(file)) for name in row.attributes or ()))


def count_prompts(file: Path) -> int | None:
    """Prompts of a file, which may have errors; None of a pipe, which can be read only once."""
    if not file.is_file():
        return None
    if file.suffix.lower() in _TABLES:
        return sum(1 for _ in read_rows(str(file)))
    with file.open("rb") as lines:
        return sum(1 for line in lines if line.strip())
