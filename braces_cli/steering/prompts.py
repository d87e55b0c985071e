"""Prompts from options, a file or a pipe, read one at a time, so that a file of any length fits in memory."""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from braces_cli.core.errors import ConfigError, DataError
from braces_cli.core.schema import ROW, cut, parse
from braces_cli.data.rows import read_rows, reported

# Files whose rows are not lines.
_TABLES = (".json", ".csv", ".tsv", ".parquet")
# Characters of a line; larger than the context of any model.
LONGEST = 10_000_000


@dataclass(frozen=True)
class PromptRow:
    """A prompt with the attributes of its row, name -> strength; None if the row has no `attributes`."""

    text: str
    attributes: Mapping[str, float] | None = None


def read_prompts(given: Sequence[str], file: Path | None, pipe: TextIO) -> Iterator[str]:
    """Return the texts of `read_prompt_rows`."""
    return (row.text for row in read_prompt_rows(given, file, pipe))


def read_prompt_rows(given: Sequence[str], file: Path | None, pipe: TextIO) -> Iterator[PromptRow]:
    """Return the prompts of `--prompt`, of `--prompts FILE`, or of standard input (lines or JSON Lines).

    The file `-` is standard input.

    Raises:
        ConfigError: two sources, or none.
        DataError: a file that is missing, empty or not UTF-8; a row without a prompt or with invalid attributes.
    """
    if given and file is not None:
        raise ConfigError("two sources of prompts", where="--prompt, --prompts", hint="Give one of them.")
    if given:
        return map(PromptRow, given)
    if file is not None and str(file) != "-":
        if not os.path.exists(file) or os.path.isdir(file):  # a named pipe is allowed
            raise DataError("no such file", where=str(file), hint="Give a text file with one prompt per line.")
        return _checked(_file_rows(file), str(file))
    if pipe.isatty() and file is None:
        hint = "Give --prompt TEXT, --prompts FILE, or pipe one per line."
        raise ConfigError("no prompt", where="--prompt", hint=hint)
    return _checked(_line_rows(pipe, "standard input"), "standard input")


def attribute_names(file: Path | None) -> list[str]:
    """Return the attributes that the rows of a file name, so that an unknown one is an error before the first text.

    Empty without a file, and for a pipe, which can be read only once.

    Raises:
        DataError: see `read_prompt_rows`.
    """
    if file is None or not file.is_file():
        return []
    return list(dict.fromkeys(name for row in _checked(_file_rows(file), str(file)) for name in row.attributes or ()))


def count_prompts(file: Path | None) -> int | None:
    """Return the number of rows of a file, without checks; None without one, and for a pipe."""
    if file is None or not file.is_file():
        return None
    if file.suffix.lower() in _TABLES:
        return sum(1 for _ in read_rows(str(file)))
    with file.open("rb") as lines:
        return sum(1 for line in lines if line.strip())


def _checked(prompts: Iterator[PromptRow], where: str) -> Iterator[PromptRow]:
    """Yield the prompts; raise data errors if the input cannot be read or is empty."""
    return reported(prompts, where, "no prompts", "Give at least one line.")


def _file_rows(path: Path) -> Iterator[PromptRow]:
    if path.suffix.lower() in _TABLES:
        yield from (_prompt_row(row.fields, row.where, row.untyped) for row in read_rows(str(path)))
        return
    with path.open(encoding="utf-8-sig") as lines:
        yield from _line_rows(lines, str(path), path.suffix.lower() == ".jsonl")


def _line_rows(lines: TextIO, where: str, structured: bool | None = None) -> Iterator[PromptRow]:
    """Yield the prompts of lines; the first line decides if they are JSON, unless `structured` does."""
    # Iteration over the file would read /dev/zero, a line without an end, into memory.
    for number, raw in enumerate(iter(lambda: lines.readline(LONGEST + 1), ""), 1):
        if len(raw) > LONGEST:
            hint = "Is this a text file? Write one prompt per line."
            raise DataError(f"a line of more than {LONGEST:,} characters", where=f"{where}:{number}", hint=hint)
        line = raw.rstrip("\r\n")
        if not line.strip():
            continue
        if structured is None:
            structured = line.startswith('{"')
        if structured:
            yield _prompt_row(parse(ROW, line, f"{where}:{number}"), f"{where}:{number}")
        else:
            yield PromptRow(line)


def _prompt_row(row: Any, where: str, untyped: bool = False) -> PromptRow:
    """Return the prompt of a row; in an untyped file, which holds text only, `attributes` is JSON."""
    prompt = row.get("prompt") if isinstance(row, dict) else None
    if isinstance(prompt, dict):  # RealToxicityPrompts and similar sets
        prompt = prompt.get("text")
    if not isinstance(prompt, str):
        keys = cut(", ".join(row)) if isinstance(row, dict) else type(row).__name__
        raise DataError(f"no `prompt` with text (keys found: {keys})", where=where, hint='Write {"prompt": "..."}.')
    attributes = row.get("attributes")
    if untyped and isinstance(attributes, str):
        attributes = parse(ROW, attributes, where) if attributes.strip() else None
    if attributes is None:
        return PromptRow(prompt)
    numbers = list(attributes.values()) if isinstance(attributes, dict) else [None]
    if not all(isinstance(s, int | float) and not isinstance(s, bool) and math.isfinite(s) for s in numbers):
        hint = 'Write {"prompt": "...", "attributes": {"positive": 2}}.'
        raise DataError("`attributes` does not map names to strengths", where=where, hint=hint)
    return PromptRow(prompt, {name: float(s) for name, s in attributes.items()})
