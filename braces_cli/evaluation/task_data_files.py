"""Which local file holds the rows of which task: `--task-data NAME=FILE_OR_FOLDER` and `--task-data-dir`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from braces_cli.core.utils.atomic_files import file_hint
from braces_cli.core.utils.errors import ConfigError, DataError, near_misses
from braces_cli.core.utils.paths import check_regular, path_exists, user_path
from braces_cli.data.readers import READABLE
from braces_cli.evaluation.task_catalog import NATIVE_TASKS, Selection

_KINDS = READABLE
# What a file of the documents to be tested may be called, where its task does not say.
_TESTED = ("test", "validation", "dev")


def parse_task_data(values: Sequence[str], known: Iterable[str]) -> dict[str, Path]:
    """`NAME=FILE` of each value.

    Raises:
        ConfigError: no such form, a name given twice, or one that is not among `--tasks`.
    """
    known = list(known)
    files: dict[str, Path] = {}
    for value in values:
        name, sign, file = (part.strip() for part in value.partition("="))
        if not (name and sign and file):
            raise ConfigError(f"`{value}` is not NAME=FILE", where="--task-data", hint="Such as popqa=popqa.jsonl.")
        if name not in known:
            hint = near_misses(name, known) or f"There are: {', '.join(known[:8])}."
            raise ConfigError(f"`{name}` is not among --tasks", where="--task-data", hint=hint)
        if name in files:
            raise ConfigError(f"`{name}` is given twice", where="--task-data", hint="Give one file a task.")
        files[name] = user_path(file)
    return files


def find_files(selection: Selection, values: Sequence[str], folder: Path | None) -> dict[str, Path]:
    """Task -> file of its rows, of the tasks that have one.

    A file for a task itself beats one for its group, and `--task-data` beats what lies in the folder.

    Raises:
        ConfigError: see `parse_task_data`; no such folder.
        DataError: no file, or a folder from which no one file can be chosen.
    """
    places = {} if folder is None else _in_folder(folder, selection.known())
    places.update(parse_task_data(values, selection.known()))
    task_names = {*selection.leaves, *selection.native}
    given = {member: place for name, place in places.items() for member in selection.members(name)}
    given.update({name: place for name, place in places.items() if name in task_names})
    files = {name: _file(name, place, selection.leaves.get(name)) for name, place in given.items()}
    for file in files.values():
        # A pipe, too: it would be read twice, for its rows and for its hash.
        check_regular(file, DataError, "Check --task-data NAME=FILE.")
    return files


def check_needed(selection: Selection, files: dict[str, Path], local_only: Iterable[str]) -> None:
    """Refuse tasks that have no data of their own and were given none.

    Raises:
        ConfigError: names what to give.
    """
    lines = {name: NATIVE_TASKS[name].data for name in selection.native}
    lines.update({name: "rows with `instruction` and `answer`" for name in local_only if name in selection.leaves})
    for name, data in lines.items():
        if name not in files:
            hint = f"Give --task-data {name}=FILE ({data})."
            raise ConfigError(f"{name} has no data of its own", where="--tasks", hint=hint)


def _in_folder(folder: Path, known: Iterable[str]) -> dict[str, Path]:
    """Tasks for which the folder holds a file `NAME.jsonl` (or its like) or a folder `NAME`."""
    folder = user_path(folder)
    if not os.path.isdir(folder):  # pathlib's would raise where a folder above is closed
        raise ConfigError("no such folder", where="--task-data-dir", hint=f"Looked for {folder}.")
    places = {}
    for name in known:
        for place in (folder / name, *(folder / f"{name}{kind}" for kind in _KINDS)):
            if path_exists(place):
                places[name] = place
                break
    return places


def _file(name: str, place: Path, entry: Any) -> Path:
    if not os.path.isdir(place):
        return place
    try:
        there = sorted(path for path in place.iterdir() if path.suffix.lower() in _KINDS)
    except OSError as error:
        raise DataError(f"cannot read: {error.strerror}", where=str(place), hint=file_hint(error)) from error
    cfg = entry.cfg if entry is not None else {}
    splits = [cfg.get("test_split") or cfg.get("validation_split"), *_TESTED]
    for split in splits:
        chosen = [path for path in there if path.stem == split]
        if len(chosen) == 1:
            return chosen[0]
    if len(there) == 1:
        return there[0]
    what = f"which file holds the rows of {name}?" if there else f"no file with rows of {name}"
    listed = ", ".join(path.name for path in there[:6]) or "nothing that can be read"
    raise DataError(what, where=str(place), hint=f"Found: {listed}. Give --task-data {name}=FILE.")
