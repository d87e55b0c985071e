"""The file of `--output`: rows of texts that an interrupted run can continue.

Rows are appended one line at a time, so that a killed run leaves at most its last line incomplete. The settings that
the texts depend on are recorded in `FILE.settings.json`.

In half precision a text can vary with its batch. A run is therefore resumed at the start of a batch, with the same
batch size, so that each text is that of an uninterrupted run in every dtype.
"""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypedDict

from braces_cli.core import files
from braces_cli.core.errors import BracesError, ConfigError, DataError
from braces_cli.core.models.generate import TextRequest
from braces_cli.core.schema import Count, Kind, parse, read, stored_form

# Key of the record: hashes of the files of adapter and attributes.
FILES = "files"


class Row(TypedDict):
    """The parts of a row that identify its request."""

    prompt: str
    text: str
    attributes: dict[str, float]
    sample: Count
    seed: int


_ROW = Kind(Row, DataError, "Only files that --output has written can be resumed; --overwrite starts again.")
_SETTINGS = Kind(dict[str, Any], DataError, "Remove it, or start again.")


class TextsFile:
    """Rows of texts in `path`.

    Args:
        settings: all settings that the texts depend on, except the prompts; a resumed run must have the same.
        batch_size: texts per batch.
        resume: keep the complete rows of an existing file.
        overwrite: replace an existing file.

    Raises:
        ConfigError: an existing file without `resume` or `overwrite`; a path that is not a file; `resume` with other
            settings, adapter or attributes.
        DataError: `resume` and a line that is not a row of texts.
    """

    def __init__(self, path: Path, settings: dict[str, Any], batch_size: int, *, resume: bool, overwrite: bool) -> None:
        self.path = path
        self._record = path.with_name(f"{path.name}.settings.json")
        self._settings: dict[str, Any] = stored_form({**settings, "batch_size": batch_size})
        self._batch_size = batch_size
        if resume and overwrite:
            raise ConfigError("both are given", where="--resume, --overwrite", hint="Give one of them.")
        files.check_output_file(path, overwrite or resume, "--resume continues it, --overwrite starts again.")
        if path.exists():  # a pipe cannot be truncated to its complete rows
            files.check_regular(path, ConfigError, "Name a file, or leave --output out and redirect standard output.")
        files.remove_partial_files(path.parent, self._record.name)
        # Offset of the end of each complete row.
        self._ends: list[int] = []
        if resume and path.is_file():
            with path.open("rb") as lines:
                for line in lines:
                    if line.endswith(b"\n"):  # else the earlier run was interrupted here
                        parse(_ROW, line, f"{path}:{len(self._ends) + 1}")
                        self._ends.append((self._ends[-1] if self._ends else 0) + len(line))
        self.rows = len(self._ends)
        if self.rows and files.path_exists(self._record):
            self._check_settings(read(_SETTINGS, self._record))

    def _check_settings(self, before: dict[str, Any]) -> None:
        """Refuse settings that differ from those of the earlier run."""
        different = {name for name in {*before, *self._settings} if before.get(name) != self._settings.get(name)}
        if different == {FILES}:
            hint = "Start again with --overwrite, or give the files of the earlier run."
            what = "the adapter or an attribute has changed since the earlier run"
            raise ConfigError(what, where=str(self.path), hint=hint)
        if different:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(different - {FILES}))
            hint = "Resume with the settings of the earlier run, or start again with --overwrite."
            raise ConfigError(f"the earlier run had another {names}", where=str(self.path), hint=hint)

    def remaining(self, requests: Iterator[TextRequest], seed: int) -> Iterator[TextRequest]:
        """Return the requests after the last complete batch; complete rows of an incomplete batch are generated again.

        Raises:
            ConfigError: the complete rows belong to other requests.
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
                    hint = "Give the prompts and settings of the earlier run, or start again with --overwrite."
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
        """Append rows after the complete ones as they are generated; returns their number.

        The file changes when there is a first row, so an error before it loses nothing.
        """
        rows, count = iter(rows), 0
        first = list(islice(rows, 1))
        with self._failures():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Unbuffered, so that nothing is left to write when the file is closed on a full disk.
            file = self.path.open("r+b" if self.rows else "wb", buffering=0)
        end = self._ends[self.rows - 1] if self.rows else 0
        try:
            with self._failures():
                file.truncate(end)
                file.seek(end)
            files.write_json(self._record, self._settings)
            for row in chain(first, rows):
                rest = memoryview(json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n")
                with self._failures():
                    while rest:  # an unbuffered write can be partial
                        rest = rest[file.write(rest) :]
                count += 1
        finally:
            with self._failures():
                file.close()
        return count

    @contextmanager
    def _failures(self) -> Iterator[None]:
        """Report errors of writing with the path and a hint."""
        try:
            yield
        except OSError as error:
            hint = f"{files.file_hint(error)} Complete lines are kept; --resume continues after them."
            what = f"cannot write: {error.strerror or error}"
            raise BracesError(what, where=str(self.path), hint=hint) from error
