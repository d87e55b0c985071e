"""A file of texts that an interrupted run can be continued into.

Rows are appended as they come, one a line, so that a run that is killed leaves at most its last line unfinished. What
the texts depend on is recorded beside the file, in `FILE.settings.json`.

A text depends a little on its batch: matrix products of other sizes add up in another order, and in bfloat16 and
float16 the difference is large enough to change a token. A run is therefore resumed where a batch of the earlier run
began, with batches of the same size, so that each text is that of a run without interruption, in every number format.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from io import FileIO
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypedDict

from braces_cli.core.errors import BracesError, ConfigError, DataError
from braces_cli.core.files import (
    check_output_file,
    check_regular,
    file_hint,
    path_exists,
    remove_partial_files,
    write_json,
)
from braces_cli.core.models.generate import TextRequest
from braces_cli.core.schema import Count, Kind, parse, read, stored_form

# In the record: hashes of the files of adapter and attributes.
FILES = "files"


class Row(TypedDict):
    """A row of the file, as far as it tells which request it answers."""

    prompt: str
    text: str
    attributes: dict[str, float]
    sample: Count
    seed: int


_ROW = Kind(Row, DataError, "Only what --output has written can be resumed; --overwrite starts anew.")
_SETTINGS = Kind(dict[str, Any], DataError, "Remove it, or start anew.")


class TextsFile:
    """Rows of texts in `path`.

    Args:
        settings: all that the texts depend on, besides the prompts; must be what an earlier run had, to resume it.
        batch_size: texts of a batch.
        resume: keep the complete lines that are there.
        overwrite: replace a file that is there.

    Raises:
        ConfigError: the file is there and neither is asked for, or is no file; or `resume` with other settings,
            or with an adapter or attribute that has changed.
        DataError: `resume`, and a line that is no row of texts.
    """

    def __init__(self, path: Path, settings: dict[str, Any], batch_size: int, *, resume: bool, overwrite: bool) -> None:
        self.path = path
        self._record = path.with_name(f"{path.name}.settings.json")
        self._settings: dict[str, Any] = stored_form({**settings, "batch_size": batch_size})
        self._batch_size = batch_size
        if resume and overwrite:
            raise ConfigError("both are given", where="--resume, --overwrite", hint="Give one of them.")
        hint = "--resume continues it, --overwrite starts anew."
        check_output_file(path, overwrite or resume, hint)
        if path.exists():  # a pipe or a device cannot be cut to its complete rows, and might keep its writer waiting
            check_regular(path, ConfigError, "Name a file, or leave --output out and redirect standard output.")
        remove_partial_files(path.parent, self._record.name)
        # Byte behind each complete row.
        self._ends = _complete(path) if resume and path.is_file() else []
        self.rows = len(self._ends)
        if self.rows:
            self._check_settings()

    def _check_settings(self) -> None:
        if not path_exists(self._record):
            return
        before = read(_SETTINGS, self._record)
        after = self._settings
        different = sorted(name for name in {*before, *after} if before.get(name) != after.get(name))
        if different == [FILES]:
            hint = "Start anew with --overwrite, or give the files of the earlier run."
            what = "the adapter or an attribute has changed since the earlier run"
            raise ConfigError(what, where=str(self.path), hint=hint)
        different = [name for name in different if name != FILES]
        if different:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in different)
            hint = "Resume with the settings of the earlier run, or start anew with --overwrite."
            raise ConfigError(f"the earlier run had another {names}", where=str(self.path), hint=hint)

    def remaining(self, requests: Iterator[TextRequest], seed: int) -> Iterator[TextRequest]:
        """The requests that are to be generated: those behind the last complete batch.

        Complete rows of an incomplete batch are generated once more, unless they are the last of all.

        Raises:
            ConfigError: the complete rows are answers to other requests.
        """
        if not self.rows:
            return requests
        again: list[TextRequest] = []
        with self.path.open("rb") as lines:
            for number in range(1, self.rows + 1):
                row = parse(_ROW, lines.readline(), f"{self.path}:{number}")
                request = next(requests, None)
                expected = None if request is None else (request.prompt, request.sample, seed, request.attributes)
                if expected != (row["prompt"], row["sample"], row["seed"], row["attributes"]):
                    hint = "Give the prompts and settings of the earlier run, or start anew with --overwrite."
                    what = "there are fewer texts to generate" if request is None else "this row is of another run"
                    raise ConfigError(what, where=f"{self.path}:{number}", hint=hint)
                assert request is not None
                again = [*again, request] if number % self._batch_size else []
        following = next(requests, None)
        if following is None:
            return iter(())
        self.rows -= len(again)
        return chain(again, [following], requests)

    def write(self, rows: Iterable[dict[str, Any]]) -> int:
        """Append rows as they come, behind the complete ones; returns how many.

        The file is touched when there is a first row: what fails before that, fails with nothing lost.
        """
        rows, count = iter(rows), 0
        first = list(islice(rows, 1))
        with _failures(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Unbuffered: on a full disk nothing is left to be written when the file is closed.
            file = self.path.open("r+b" if self.rows else "wb", buffering=0)
        end = self._ends[self.rows - 1] if self.rows else 0
        try:
            with _failures(self.path):
                file.truncate(end)
                file.seek(end)
            write_json(self._record, self._settings)
            for row in chain(first, rows):
                with _failures(self.path):
                    _write_all(file, json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n")
                count += 1
        finally:
            # What could not be written is tried once more here.
            with _failures(self.path):
                file.close()
        return count


def _write_all(file: FileIO, content: bytes) -> None:
    """Write to an unbuffered file, which may take less than it is given."""
    rest = memoryview(content)
    while rest:
        rest = rest[file.write(rest) :]


@contextmanager
def _failures(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        hint = f"{file_hint(error)} Complete lines are kept; --resume continues after them."
        raise BracesError(f"cannot write: {error.strerror or error}", where=str(path), hint=hint) from error


def _complete(path: Path) -> list[int]:
    """The byte behind each complete row at the beginning of a file."""
    ends: list[int] = []
    end = 0
    with path.open("rb") as lines:
        for line in lines:
            if not line.endswith(b"\n"):
                break  # where a run was cut off
            parse(_ROW, line, f"{path}:{len(ends) + 1}")
            end += len(line)
            ends.append(end)
    return ends
