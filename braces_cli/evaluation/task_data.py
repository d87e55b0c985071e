"""A task's rows from a local file, without any network: `--task-data NAME=FILE`.

The file is read and checked here, before any model is loaded; lm-eval then gets a definition that includes the task's
own and changes nothing but where its rows come from.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from braces_cli.core.errors import ConfigError, DataError
from braces_cli.core.files import check_regular
from braces_cli.core.schema import decode
from braces_cli.data.rows import Source, read_rows
from braces_cli.evaluation.tasks import commonsense
from braces_cli.evaluation.tasks.popqa import possible_answers

_HINT = "Check --task-data NAME=FILE."
# What a row must hold, by task; `a.b` is the field b of the mapping a. lm-eval itself only says which template failed.
FIELDS: dict[str, tuple[str, ...]] = {
    "truthfulqa_mc1": ("question", "mc1_targets.choices", "mc1_targets.labels"),
    "truthfulqa_mc2": ("question", "mc2_targets.choices", "mc2_targets.labels"),
    "truthfulqa_gen": ("question", "best_answer", "correct_answers", "incorrect_answers"),
    "triviaqa": ("question", "answer.aliases"),
    "nq_open": ("question", "answer"),
    "boolq": ("passage", "question", "label"),
    "piqa": ("goal", "sol1", "sol2", "label"),
    "social_iqa": ("context", "question", "answerA", "answerB", "answerC", "label"),
    "hellaswag": ("activity_label", "ctx_a", "ctx_b", "endings", "label"),
    "winogrande": ("sentence", "option1", "option2", "answer"),
    **dict.fromkeys(("arc_easy", "arc_challenge"), ("question", "choices.text", "choices.label", "answerKey")),
    "openbookqa": ("question_stem", "choices.text", "choices.label", "answerKey"),
    **dict.fromkeys(commonsense.TASKS, ("instruction", "answer")),
    **dict.fromkeys(("popqa", "embedded_popqa"), ("question", "possible_answers")),
    "embedded_truthful": ("question", "mc1_targets.choices", "mc1_targets.labels"),
    "perplexity": ("text",),
}
_LISTS = {"choices", "labels", "aliases", "correct_answers", "incorrect_answers", "choices.text", "endings"}


def read_task_rows(path: Path) -> list[Source]:
    """Rows of a JSON Lines, JSON, CSV, TSV or Parquet file.

    Raises:
        DataError: missing, empty, of another kind, or broken (with its line where the format has lines).
    """
    check_regular(path, DataError, _HINT)
    return list(read_rows(str(path)))


def read_texts(path: Path) -> list[str]:
    """Documents to measure perplexity on: lines of a `.txt` file, or `text` of each row, blank ones left out.

    Raises:
        DataError: as `read_rows`, or a row without `text`, or nothing but blanks.
    """
    if path.suffix.lower() == ".txt":
        check_regular(path, DataError, _HINT)
        try:
            texts = path.read_text(encoding="utf-8-sig").split("\n")
        except UnicodeDecodeError as error:
            raise DataError(f"not UTF-8 (byte {error.start})", where=str(path), hint="Save it as UTF-8.") from error
    else:
        rows = read_task_rows(path)
        check_fields("perplexity", rows)
        texts = [row.fields["text"] for row in rows]
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise DataError("the file is blank", where=str(path), hint="Give one document per line, or rows with `text`.")
    return texts


def check_fields(task: str, rows: Sequence[Source]) -> None:
    """Hold every row to what the task reads; a task that is not in `FIELDS` is left to lm-eval.

    Raises:
        DataError: a missing field, named with those that were found, or one of the wrong kind.
    """
    needed = FIELDS.get(task, ())
    for row in rows:
        fields, where = row.fields, row.where
        _unpack(fields, needed)
        missing = [name for name in needed if _get(fields, name) is None]
        if missing:
            plural = "s" if len(missing) > 1 else ""
            fields_here = ", ".join(_shown(name, value) for name, value in fields.items()) or "nothing"
            raise DataError(
                f"{task} needs the field{plural} {', '.join(missing)}", where=where, hint=f"Found: {fields_here}."
            )
        problem = _problem(task, fields, needed)
        if problem:
            raise DataError(f"{task}: {problem}", where=where, hint=f"A row holds {', '.join(needed)}.")


def write_override(entry: Any, rows: Sequence[Source], folder: Path) -> None:
    """Write into `folder` the rows and a definition of the task `entry` that reads them.

    The split that few-shot examples come from is named as the test split, whatever it was: both are the same rows
    now, and lm-eval takes care that a document is no example of itself only where the two are one split.

    Raises:
        ConfigError: the task is a Python class or builds its data itself.
        DataError: rows that fit no table.
    """
    cfg, name = entry.cfg, entry.name
    if "class" in cfg:
        raise ConfigError(f"`{name}` is written in Python", where="--task-data", hint="It can use only its own data.")
    data = folder / f"{name}.parquet"
    _write_parquet(rows, data)
    shots = (cfg.get("fewshot_config") or {}).get("split") or cfg.get("fewshot_split")
    tested = cfg.get("test_split") or cfg.get("validation_split") or "test"
    splits = {"test_split": shots} if shots else {"test_split": None, "validation_split": tested}
    names = {tested, shots, cfg.get("training_split"), cfg.get("validation_split")} - {None}
    override = {
        "include": str(entry.yaml_path),
        "task": name,
        # The original still stands under its tags; a second entry would replace them with this one task alone.
        "tag": None,
        "custom_dataset": None,
        "dataset_path": "parquet",
        "dataset_name": None,
        # A cache of its own, gone with the folder: a file that has changed must never be served as it was.
        "dataset_kwargs": {
            "data_files": {split: str(data) for split in sorted(names)},
            "cache_dir": str(folder / "cache"),
        },
        **splits,
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(override), encoding="utf-8")


def _unpack(fields: dict[str, Any], needed: Sequence[str]) -> None:
    """Read the mappings and lists that a CSV file can only hold as JSON text."""
    for name in needed:
        head = name.partition(".")[0]
        value = fields.get(head)
        if (head != name or head in _LISTS) and isinstance(value, str) and value[:1] in ("{", "["):
            try:
                fields[head] = decode(value)
            except ValueError:
                continue  # reported as a missing field


def _get(fields: Any, name: str) -> Any:
    for part in name.split("."):
        fields = fields.get(part) if isinstance(fields, dict) else None
    return fields


def _shown(name: str, value: Any) -> str:
    return f"{name}{{{', '.join(map(str, value))}}}" if isinstance(value, dict) else name


def _problem(task: str, fields: dict[str, Any], needed: Sequence[str]) -> str | None:
    """What is wrong with the values of a row whose fields are all there."""
    for name in needed:
        value = _get(fields, name)
        if name in _LISTS or name.rpartition(".")[2] in _LISTS:
            if not isinstance(value, list) or not value:
                return f"{name} is no list with something in it"
        elif name in ("question", "text", "instruction") and not isinstance(value, str):
            return f"{name} is no text"
    if task in ("truthfulqa_mc1", "truthfulqa_mc2"):
        targets = fields[f"{task.rpartition('_')[2]}_targets"]
        if len(targets["choices"]) != len(targets["labels"]):
            return f"{len(targets['choices'])} choices and {len(targets['labels'])} labels"
        if task == "truthfulqa_mc1" and targets["labels"][0] != 1:
            # lm-eval takes the first choice as the right one without looking at the labels.
            return "the first choice must be the right one (label 1)"
    if task == "popqa":
        try:
            if not any(answer.strip() for answer in possible_answers(fields)):
                return "possible_answers is empty"
        except ValueError:
            return 'possible_answers is not a JSON list of strings, such as ["Paris"]'
    return None


def _write_parquet(rows: Sequence[Source], path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    names = dict.fromkeys(name for row in rows for name in row.fields)
    columns = {name: _column([row.fields.get(name) for row in rows]) for name in names}
    try:
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
    except pyarrow.ArrowException as error:
        where = rows[0].where.partition(", row")[0]
        raise DataError(
            f"the rows do not form a table: {error}", where=where, hint="Give every field values of one type."
        ) from error


def _column(values: list[Any]) -> Any:
    """A column; values of several kinds (5 here, "five" there) and empty mappings, which Parquet has not, as text."""
    import pyarrow

    try:
        column = pyarrow.array(values)
        if not (pyarrow.types.is_struct(column.type) and column.type.num_fields == 0):
            return column
    except (pyarrow.ArrowException, OverflowError):
        pass
    return pyarrow.array([v if v is None or isinstance(v, str) else json.dumps(v, ensure_ascii=False) for v in values])
