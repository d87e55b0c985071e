"""Local rows of tasks: `--task-data NAME=FILE_OR_FOLDER` and `--task-data-dir`.

Files are found, read and checked before any model is loaded. For its own tasks lm-eval then gets a definition that
includes the original one and replaces the source of the rows only.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from braces_cli.core.errors import ConfigError, DataError, near_misses
from braces_cli.core.files import check_regular, file_hint, path_exists, user_path
from braces_cli.core.schema import decode
from braces_cli.data.rows import READABLE, Source, read_rows
from braces_cli.evaluation.catalog import NATIVE_TASKS, Selection
from braces_cli.evaluation.task_functions import COMMONSENSE_TASKS

# File names of the documents to evaluate, if the task does not name its split.
_TESTED = ("test", "validation", "dev")


def find_files(selection: Selection, values: Sequence[str], folder: Path | None) -> dict[str, Path]:
    """Return task -> file of its rows, for the tasks that have one.

    A file for a task takes precedence over one for its group, and `--task-data` over `--task-data-dir`.
    """
    places = {} if folder is None else _in_folder(folder, selection.known())
    places.update(_parse_task_data(values, selection.known()))
    task_names = {*selection.leaves, *selection.native}
    given = {member: place for name, place in places.items() for member in selection.members(name)}
    given.update({name: place for name, place in places.items() if name in task_names})
    files = {name: _file(name, place, selection.leaves.get(name)) for name, place in given.items()}
    for file in files.values():
        # Pipes are refused, too: the file is read twice, for its rows and for its hash.
        check_regular(file, DataError, "Check --task-data NAME=FILE.")
    needed = {name: NATIVE_TASKS[name].data for name in selection.native}
    needed.update({name: "rows with `instruction` and `answer`" for name in COMMONSENSE_TASKS if name in task_names})
    for name, data in needed.items():
        if name not in files:
            hint = f"Give --task-data {name}=FILE ({data})."
            raise ConfigError(f"{name} has no data set on the hub", where="--tasks", hint=hint)
    return files


def _parse_task_data(values: Sequence[str], known: Sequence[str]) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for value in values:
        name, sign, file = (part.strip() for part in value.partition("="))
        if not (name and sign and file):
            raise ConfigError(f"`{value}` is not NAME=FILE", where="--task-data", hint="Such as popqa=popqa.jsonl.")
        if name not in known:
            hint = near_misses(name, known) or f"There are: {', '.join(known[:8])}."
            raise ConfigError(f"`{name}` is not among --tasks", where="--task-data", hint=hint)
        if name in files:
            raise ConfigError(f"`{name}` is given twice", where="--task-data", hint="Give one file per task.")
        files[name] = user_path(file)
    return files


def _in_folder(folder: Path, known: Iterable[str]) -> dict[str, Path]:
    """Return the tasks for which the folder has a file `NAME.jsonl` (or another format) or a folder `NAME`."""
    folder = user_path(folder)
    if not os.path.isdir(folder):  # Path.is_dir raises if a parent folder is not readable
        raise ConfigError("no such folder", where="--task-data-dir", hint=f"Looked for {folder}.")
    places = {}
    for name in known:
        found = [place for kind in ("", *READABLE) if path_exists(place := folder / f"{name}{kind}")]
        places.update({name: found[0]} if found else {})
    return places


def _file(name: str, place: Path, entry: Any) -> Path:
    """Return the file with the rows of a task, `place` itself or the one in that folder."""
    if not os.path.isdir(place):
        return place
    try:
        found = sorted(path for path in place.iterdir() if path.suffix.lower() in READABLE)
    except OSError as error:
        raise DataError(f"cannot read: {error.strerror}", where=str(place), hint=file_hint(error)) from error
    cfg = entry.cfg if entry is not None else {}
    for split in (cfg.get("test_split") or cfg.get("validation_split"), *_TESTED):
        chosen = [path for path in found if path.stem == split]
        if len(chosen) == 1:
            return chosen[0]
    if len(found) == 1:
        return found[0]
    what = f"which file holds the rows of {name}?" if found else f"no file with rows of {name}"
    listed = ", ".join(path.name for path in found[:6]) or "no file in a known format"
    raise DataError(what, where=str(place), hint=f"Found: {listed}. Give --task-data {name}=FILE.")


def read_task_rows(task: str, path: Path) -> list[Source]:
    """Read the rows of an lm-eval task; mappings and lists in CSV files are decoded from JSON.

    lm-eval reports rows that it cannot render. Targets of TruthfulQA are checked here: it reads them after measuring.
    """
    rows = list(read_rows(str(path)))
    for row in rows:
        for name, value in row.fields.items() if path.suffix.lower() in (".csv", ".tsv") else ():
            if isinstance(value, str) and value[:1] in ("{", "["):
                with contextlib.suppress(ValueError):
                    row.fields[name] = decode(value)
        if task in ("truthfulqa_mc1", "truthfulqa_mc2"):
            name = f"{task.removeprefix('truthfulqa_')}_targets"
            targets = row.fields.get(name)
            lists: list[Any] = [targets.get(key) for key in ("choices", "labels")] if isinstance(targets, dict) else []
            if not lists or not all(isinstance(each, list) and each for each in lists) or len({*map(len, lists)}) > 1:
                hint = f"Found: {', '.join(row.fields)}."
                raise DataError(f"{name} is not a mapping of equal lists choices, labels", where=row.where, hint=hint)
            # lm-eval counts the first choice as correct and does not read the labels.
            if task == "truthfulqa_mc1" and lists[1][0] != 1:
                hint = "Put the right choice first, with label 1."
                raise DataError("the first choice must be the right one", where=row.where, hint=hint)
    return rows


def write_override(entry: Any, rows: Sequence[Source], folder: Path) -> None:
    """Write the rows and a definition of the task `entry` that reads them into `folder`.

    The split of few-shot examples becomes the test split, since both are the same rows: lm-eval excludes a document
    from its own examples only if the two are one split.
    """
    cfg, name = entry.cfg, entry.name
    if "class" in cfg:
        raise ConfigError(f"`{name}` is written in Python", where="--task-data", hint="It only reads its own data.")
    data = folder / f"{name}.parquet"
    _write_parquet(rows, data)
    shots = (cfg.get("fewshot_config") or {}).get("split") or cfg.get("fewshot_split")
    tested = cfg.get("test_split") or cfg.get("validation_split") or "test"
    splits = {"test_split": shots} if shots else {"test_split": None, "validation_split": tested}
    names = {tested, shots, cfg.get("training_split"), cfg.get("validation_split")} - {None}
    override = {
        "include": str(entry.yaml_path),
        "task": name,
        # The original is still listed under its tags; a second entry would replace them with this task alone.
        "tag": None,
        "custom_dataset": None,
        "dataset_path": "parquet",
        "dataset_name": None,
        # A separate cache, deleted with the folder: a changed file must not be read from an old cache.
        "dataset_kwargs": {
            "data_files": {split: str(data) for split in sorted(names)},
            "cache_dir": str(folder / "cache"),
        },
        **splits,
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(override), encoding="utf-8")


def _write_parquet(rows: Sequence[Source], path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    names = dict.fromkeys(name for row in rows for name in row.fields)
    columns = {name: _column([row.fields.get(name) for row in rows]) for name in names}
    try:
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
    except pyarrow.ArrowException as error:
        where = rows[0].where.partition(", row")[0]
        hint = "Give every field values of one type."
        raise DataError(f"the rows do not form a table: {error}", where=where, hint=hint) from error


def _column(values: list[Any]) -> Any:
    """Return a column; mixed types (5 and "five") and empty mappings, which Parquet does not have, become text."""
    import pyarrow

    try:
        column = pyarrow.array(values)
        if not (pyarrow.types.is_struct(column.type) and column.type.num_fields == 0):
            return column
    except (pyarrow.ArrowException, OverflowError):
        pass
    return pyarrow.array([v if v is None or isinstance(v, str) else json.dumps(v, ensure_ascii=False) for v in values])
