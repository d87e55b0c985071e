"""Prompts from options, a file or a pipe, one at a time, so that a file of any length fits in memory."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TextIO

from braces_cli.core.utils.atomic_files import file_hint
from braces_cli.core.utils.decoding import cut
from braces_cli.core.utils.documents import ROW, parse
from braces_cli.core.utils.errors import ConfigError, DataError


def read_prompts(given: Sequence[str], file: Path | None, pipe: TextIO) -> Iterator[str]:
    """Prompts of `--prompt`, else of `--prompts FILE`, else of standard input (one a line, or JSON Lines).

    The file `-` is standard input.

    Raises:
        ConfigError: two sources, or none.
        DataError: the file is missing, empty, not UTF-8, or a line has no prompt.
    """
    if given and file is not None:
        raise ConfigError("two sources of prompts", where="--prompt, --prompts", hint="Give one of them.")
    if given:
        return iter(given)
    if file is not None and str(file) != "-":
        if not os.path.exists(file) or os.path.isdir(file):  # a pipe with a name will do
            raise DataError("no such file", where=str(file), hint="Give a text file with one prompt a line.")
        return _some(_file(file), str(file))
    if pipe.isatty() and file is None:
        raise ConfigError("no prompt", where="--prompt", hint="Give --prompt TEXT, --prompts FILE, or pipe one a line.")
    return _some(_lines(pipe, "standard input"), "standard input")


def _file(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8-sig") as lines:
        yield from _lines(lines, str(path), path.suffix in (".jsonl", ".json"))


def _some(prompts: Iterator[str], where: str) -> Iterator[str]:
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


def _lines(lines: Iterable[str], where: str, structured: bool | None = None) -> Iterator[str]:
    for number, raw in enumerate(lines, 1):
        line = raw.rstrip("\r\n")
        if not line.strip():
            continue
        if structured is None:
            # A pipe does not say what it carries; its first line does.
            structured = line.startswith('{"')
        yield _structured(line, f"{where}:{number}") if structured else line


def _structured(line: str, where: str) -> str:
    row = parse(ROW, line, where)
    prompt = row.get("prompt") if isinstance(row, dict) else None
    if isinstance(prompt, dict):  # as RealToxicityPrompts and its relatives nest it
        prompt = prompt.get("text")
    if not isinstance(prompt, str):
        keys = cut(", ".join(row)) if isinstance(row, dict) else type(row).__name__
        raise DataError(f"no `prompt` with text (keys found: {keys})", where=where, hint='Write {"prompt": "..."}.')
    return prompt


def count_prompts(file: Path) -> int | None:
    """Lines of a file that hold a prompt; None of a pipe, which can be read only once."""
    if not file.is_file():
        return None
    with file.open("rb") as lines:
        return sum(1 for line in lines if line.strip())
