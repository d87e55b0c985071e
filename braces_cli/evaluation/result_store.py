"""The output folder of an evaluation: what each system scored on each task, written atomically when the task is done.

run.json                        the settings; `--resume` continues a run of the same settings only
parts/SYSTEM/TASK.json          scores, document by document
samples/SYSTEM/TASK.jsonl       with `--log-samples`: prompt, answer and scores of each document
results.json, results.md        the result, written last
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, TypedDict

from braces_cli.core.schema import Count, Kind, check, read, stored_form
from braces_cli.core.utils.atomic_files import check_output_folder, finite, remove_partial_files, write_json, write_text
from braces_cli.core.utils.errors import ConfigError, ModelError
from braces_cli.core.utils.paths import path_exists
from braces_cli.evaluation.scores import Scores, StoredScores, by_task, slug

RESULTS = "results.json"
_RUN = "run.json"
_FORMAT = 1


class StoredMetric(TypedDict):
    """A result; what is not finite is null."""

    value: float | None
    stderr: float | None
    n: Count


class StoredSystem(TypedDict):
    """A system of `results.json`."""

    name: str
    model: str
    adapter: str | None
    method: str | None
    sha256: str | None
    results: dict[str, dict[str, StoredMetric]]


# A key of it is a word of Python.
StoredComparison = TypedDict(
    "StoredComparison",
    {
        "task": str, "metric": str, "from": str, "to": str, "difference": float | None, "p_value": float | None,
        "p_holm": float | None,
    },
)  # fmt: skip


class StoredSettings(TypedDict):
    """What a table shows of the settings."""

    revision: str | None
    fingerprint: str | None
    dtype: str
    quantize: str | None
    tokenizer: dict[str, str | None]
    apply_chat_template: bool | None
    limit: Count | None
    num_fewshot_used: dict[str, Any]
    task_versions: dict[str, Any]
    task_data_sha256: dict[str, str]
    higher_is_better: dict[str, dict[str, bool]]
    seeds: dict[str, int | None]
    versions: dict[str, str]
    significance_level: float


class StoredResults(TypedDict):
    """`results.json`; what other programs need beside it is kept as it is."""

    systems: list[StoredSystem]
    comparisons: list[StoredComparison]
    settings: StoredSettings


_RESUME = "Remove the file and resume."
_ANY = Kind(dict[str, Any], ModelError, _RESUME, "result")
_SETTINGS = Kind(dict[str, Any], ModelError, "Give another --output-dir, or --overwrite.", "record of a run")
_RESULTS = Kind(StoredResults, ModelError, _RESUME)
_PART = Kind(StoredScores, ModelError, _RESUME, "part of a result")


class Store:
    """The folder of one run; stores nothing where `folder` is None."""

    def __init__(self, folder: Path | None = None, *, log_samples: bool = False) -> None:
        self.folder = folder
        self.log_samples = log_samples

    def begin(self, identity: dict[str, Any], resume: bool) -> dict[str, Any] | None:
        """Start or continue a run.

        Args:
            identity: all that the result depends on.
            resume: keep what a run of the same settings has stored.

        Returns:
            The result of a finished run that is resumed, else None.

        Raises:
            ConfigError: the folder holds a run of other settings.
        """
        if self.folder is None:
            return None
        for place in (self.folder, *self.folder.glob("parts/*"), *self.folder.glob("samples/*")):
            remove_partial_files(place)
        expected = stored_form({"format": _FORMAT, "log_samples": self.log_samples, **identity})
        if resume and path_exists(self.folder / _RUN):
            stored = read(_SETTINGS, self.folder / _RUN)
            other = sorted(key for key in {*stored, *expected} if stored.get(key) != expected.get(key))
            if other:
                what = f"a run of other settings was begun here ({', '.join(other)})"
                hint = "Give the same settings, another --output-dir, or --overwrite instead of --resume."
                raise ConfigError(what, where=str(self.folder), hint=hint)
            return read_results(self.folder / RESULTS) if path_exists(self.folder / RESULTS) else None
        for old in (_RUN, RESULTS, "results.md"):
            (self.folder / old).unlink(missing_ok=True)
        for old in ("parts", "samples"):
            shutil.rmtree(self.folder / old, ignore_errors=True)
        write_json(self.folder / _RUN, expected)
        return None

    def load(self, system: str, unit: str) -> Scores | None:
        """What is stored of a system's unit, without samples; None where it was not finished.

        Raises:
            ModelError: damaged.
        """
        path = self._part(system, unit)
        if path is None or not path_exists(path):
            return None
        scores = Scores.from_json(read(_PART, path))
        metrics = {(task, metric) for task, entries in scores.results.items() for metric in entries}
        for key, units in scores.units.items():
            if units.keys() != scores.documents.get(key, {}).keys():
                what = f"`units` of {' '.join(key)} are not those of its `documents`"
                raise ModelError(what, where=str(path), hint=_RESUME)
        for task, metric in scores.documents.keys() - metrics:
            what = f"`results` of {task} have no `{metric}`, which its `documents` have"
            raise ModelError(what, where=str(path), hint=_RESUME)
        return scores

    def save(self, system: str, unit: str, scores: Scores) -> None:
        """Store a finished unit: its samples, and then the scores that say that it is finished."""
        path = self._part(system, unit)
        if path is None or self.folder is None:
            return
        if self.log_samples:
            for task, rows in by_task(scores.samples):
                lines = [json.dumps(finite({"system": system, **row}), ensure_ascii=False) for row in rows]
                write_text(self.folder / "samples" / slug(system) / f"{slug(task)}.jsonl", "\n".join(lines) + "\n")
        # Infinite values are kept as Python writes them: nothing but `load` reads this file.
        write_text(path, json.dumps(scores.to_json()) + "\n")

    def _part(self, system: str, unit: str) -> Path | None:
        return None if self.folder is None else self.folder / "parts" / slug(system) / f"{slug(unit)}.json"


def check_folder(folder: Path | None, *, overwrite: bool, resume: bool, log_samples: bool) -> None:
    """Check the output folder before any work.

    Raises:
        ConfigError: nowhere to store, or a folder that holds something else.
    """
    if folder is None:
        for name, given in (("--resume", resume), ("--log-samples", log_samples)):
            if given:
                raise ConfigError("nowhere to store anything", where=name, hint="Give --output-dir.")
        return
    if (folder / _RUN).is_file():
        hint = "--resume continues the run there; --overwrite starts anew."
        check_output_folder(folder, overwrite or resume, hint)
    else:
        check_output_folder(folder, overwrite or resume)


def read_results(path: Path) -> dict[str, Any]:
    """The result of a finished run.

    Raises:
        ModelError: damaged.
    """
    result = read(_ANY, path)
    systems = check(_RESULTS, result, str(path))["systems"]
    scored = [{(task, metric) for task, each in system["results"].items() for metric in each} for system in systems]
    if not systems or any(each != scored[0] for each in scored):
        what = "`systems` is empty, or they were not scored on the same tasks"
        raise ModelError(what, where=str(path), hint=_RESULTS.hint)
    return result
