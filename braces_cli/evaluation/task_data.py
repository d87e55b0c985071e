"""Local rows of tasks: `--task-data NAME=FILE_OR_FOLDER` and `--task-data-dir`.

Files are found, read and checked before any model is loaded. For its own tasks lm-eval then gets a definition that
includes the original one and replaces the source of the rows only.
"""

import contextlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

import pyarrow
import pyarrow.parquet
import yaml

from braces_cli.core.errors import ConfigError, DataError, near_misses
from braces_cli.core.files import check_regular, file_hint, path_exists, user_path
from braces_cli.core.schema import Kind, check, decode
from braces_cli.data.rows import READABLE, Source, read_rows
from braces_cli.evaluation.catalog import NATIVE_TASKS, Selection
from braces_cli.evaluation.task_functions import COMMONSENSE_TASKS


class Targets(TypedDict):
    """Choices of a TruthfulQA row, and 1 for the right ones, else 0."""

    choices: list[str]
    labels: list[int]


_TARGETS = Kind(Targets, DataError, "Give equal lists `choices` and `labels`; for mc1 the right choice is first.")
# File names of the documents to evaluate, if the task does not name its split.
_TESTED = ("test", "validation", "dev")


def find_files(selection: Selection, values: Sequence[str], folder: Path | None) -> dict[str, Path]:
    """Return task -> file of its rows, for the tasks that have one.

    A file for a task takes precedence over one for its group, and `--task-data` over `--task-data-dir`.
    """
    known = selection.known()
    places: dict[str, Path] = {}
    if folder is not None:
        folder = user_path(folder)
        if not os.path.isdir(folder):  # Path.is_dir raises if a parent folder is not readable
            raise ConfigError("no such folder", where="--task-data-dir", hint=f"Looked for {folder}.")
        for name in known:
            found = [place for each in _names(name) if path_exists(place := folder / each)]
            places |= {name: found[0]} if found else {}
    for value in values:
        name, _, file = (part.strip() for part in value.partition("="))
        if not (name and file):
            raise ConfigError(f"`{value}` is not NAME=FILE", where="--task-data", hint="Such as popqa=popqa.jsonl.")
        if name not in known:
            hint = near_misses(name, known) or f"There are: {', '.join(known[:8])}."
            raise ConfigError(f"`{name}` is not among --tasks", where="--task-data", hint=hint)
        places[name] = user_path(file)
    # Groups first, so that a file for a task replaces the group's.
    order = sorted(places, key=lambda name: selection.members(name) == [name])
    given = {member: places[name] for name in order for member in selection.members(name)}
    files = {name: _file(name, place, selection.leaves.get(name)) for name, place in given.items()}
    for path in files.values():
        # Pipes are refused, too: the file is read twice, for its rows and for its hash.
        check_regular(path, DataError, "Check --task-data NAME=FILE.")
    needed = {name: NATIVE_TASKS[name].data for name in selection.native}
    needed |= {name: "rows with `instruction` and `answer`" for name in COMMONSENSE_TASKS if name in selection.leaves}
    for name, data in needed.items():
        if name not in files:
            hint = f"Give --task-data {name}=FILE ({data})."
            if folder is not None:
                hint += f" {folder} has none of {', '.join(_names(name))}."
            raise ConfigError(f"{name} has no data set on the hub", where="--tasks", hint=hint)
    return files


# Data sets whose folders have other names in the repository of LLM-Adapters.
_LLM_ADAPTERS = {"social_iqa": "social_i_qa", "arc_easy": "ARC-Easy", "arc_challenge": "ARC-Challenge"}


def _names(task: str) -> list[str]:
    """Return the names that a task's folder or file can have in `--task-data-dir`, in order of precedence."""
    names = [f"{task}{kind}" for kind in ("", *READABLE)]
    dataset = task.removeprefix("commonsense_gen_")
    return (
        [*names, *dict.fromkeys([dataset, _LLM_ADAPTERS.get(dataset, dataset)])] if task in COMMONSENSE_TASKS else names
    )


def _file(name: str, place: Path, entry: Any) -> Path:
    """Return the file with the rows of a task, `place` itself or the one in that folder."""
    if not os.path.isdir(place):
        return place
    try:
        found = sorted(path for path in place.iterdir() if path.suffix.lower() in READABLE)
    except OSError as error:
        raise DataError(f"cannot read: {error.strerror}", where=str(place), hint=file_hint(error)) from error
    cfg = entry.cfg if entry is not None else {}
    splits = (cfg.get("test_split") or cfg.get("validation_split"), *_TESTED)
    chosen = [path for split in splits for path in found if path.stem == split]
    if chosen or len(found) == 1:
        return (chosen or found)[0]
    listed = ", ".join(path.name for path in found[:6]) or "no file in a known format"
    what = f"which file holds the rows of {name}?"
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
            targets = check(_TARGETS, row.fields.get(name), f"{row.where}, {name}")
            if not targets["labels"] or len(targets["choices"]) != len(targets["labels"]):
                raise DataError(f"{name} has other numbers of choices than labels", where=row.where, hint=_TARGETS.hint)
            # lm-eval counts the first choice as correct and does not read the labels.
            if task == "truthfulqa_mc1" and targets["labels"][0] != 1:
                raise DataError("the first choice must be the right one", where=row.where, hint=_TARGETS.hint)
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
    fields = dict.fromkeys(field for row in rows for field in row.fields)
    columns = {field: _column([row.fields.get(field) for row in rows]) for field in fields}
    pyarrow.parquet.write_table(pyarrow.table(columns), data)
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


def _column(values: list[Any]) -> Any:
    """Return a column; mixed types (5 and "five") and empty mappings, which Parquet does not have, become text."""
    try:
        column = pyarrow.array(values)
        pyarrow.parquet.write_table(pyarrow.table({"column": column}), pyarrow.BufferOutputStream())
        return column
    except (pyarrow.ArrowException, OverflowError):
        texts = [v if v is None or isinstance(v, str) else json.dumps(v, ensure_ascii=False) for v in values]
        return pyarrow.array(texts)
