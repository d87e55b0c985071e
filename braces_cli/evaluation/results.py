"""What a system scored: results, the score of each document, averages over tasks, and how they are stored.

The output folder of an evaluation: what each system scored on each task, written atomically when the task is done.

run.json                        the settings; `--resume` continues a run of the same settings only
parts/SYSTEM/TASK.json          scores, document by document
samples/SYSTEM/TASK.jsonl       with `--log-samples`: prompt, answer and scores of each document
results.json, results.md        the result, written last
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any, TypedDict

from braces_cli.core.errors import ConfigError, ModelError
from braces_cli.core.files import check_output_folder, finite, path_exists, remove_partial_files, write_json, write_text
from braces_cli.core.schema import Count, Kind, Size, check, read, stored_form

Key = tuple[str, str]
# Metric of a group: the average over its tasks.
AVERAGE = "braces_average"


class Result(TypedDict):
    """A metric of a task."""

    value: float
    stderr: float | None
    n: Count


class StoredScores(TypedDict):
    """See `Scores.to_json`."""

    results: dict[str, dict[str, Result]]
    documents: list[tuple[str, str, list[tuple[Count, float]]]]
    units: list[tuple[str, str, list[tuple[Count, float]]]]
    better: list[tuple[str, str, bool]]
    shots: dict[str, Count]
    versions: dict[str, Any]
    batch_sizes: list[Size]


@dataclass
class Scores:
    """What one system scored on one or more tasks.

    Attributes:
        results: task or group -> metric -> `{value, stderr, n}`.
        documents: (task, metric) -> document id -> value, where each document has one.
        units: (task, metric) -> document id -> what the metric divides by, where it is a ratio of sums.
        better: (task, metric) -> whether more of it is better, where that is known.
        shots: task -> number of few-shot examples used.
        versions: task -> version of its definition.
        batch_sizes: those used; several where lm-eval chose them or memory did not suffice.
        samples: rows of the per-sample log.
    """

    results: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    documents: dict[Key, dict[int, float]] = field(default_factory=dict)
    units: dict[Key, dict[int, float]] = field(default_factory=dict)
    better: dict[Key, bool] = field(default_factory=dict)
    shots: dict[str, int] = field(default_factory=dict)
    versions: dict[str, Any] = field(default_factory=dict)
    batch_sizes: list[int] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)

    def add(self, other: Scores) -> None:
        """Take over what `other` measured."""
        for name in ("results", "documents", "units", "better", "shots", "versions"):
            getattr(self, name).update(getattr(other, name))
        self.batch_sizes = sorted({*self.batch_sizes, *other.batch_sizes})
        self.samples += other.samples

    def to_json(self) -> dict[str, Any]:
        """Everything but the samples; keys of pairs as lists of `[task, metric, value]`."""
        pairs = {
            name: [[*key, list(value.items()) if isinstance(value, dict) else value] for key, value in scores.items()]
            for name, scores in (("documents", self.documents), ("units", self.units), ("better", self.better))
        }
        plain = {name: getattr(self, name) for name in ("results", "shots", "versions", "batch_sizes")}
        return {**plain, **pairs}

    @classmethod
    def from_json(cls, stored: StoredScores) -> Scores:
        results: dict[str, Any] = {**stored["results"]}
        scores = cls(results, shots=stored["shots"], versions=stored["versions"], batch_sizes=stored["batch_sizes"])
        scores.documents = {(task, metric): dict(rows) for task, metric, rows in stored["documents"]}
        scores.units = {(task, metric): dict(rows) for task, metric, rows in stored["units"]}
        scores.better = {(task, metric): better for task, metric, better in stored["better"]}
        return scores


def add_averages(scores: Scores, groups: Mapping[str, Sequence[str]]) -> None:
    """For each group, the plain mean over its tasks of each task's first metric."""
    for name, tasks in groups.items():
        entries = [next(iter(scores.results[task].values())) for task in tasks]
        errors = [entry["stderr"] for entry in entries]
        stderr = None if None in errors else math.sqrt(sum(error**2 for error in errors)) / len(entries)
        value = sum(entry["value"] for entry in entries) / len(entries)
        number = sum(entry["n"] for entry in entries)
        scores.results[name] = {AVERAGE: {"value": value, "stderr": stderr, "n": number}}
        scores.better[name, AVERAGE] = True


def collect(output: Any, shots: dict[str, int], batch_sizes: list[int]) -> Scores:
    """Scores from what `lm_eval.evaluate` returns."""
    scores = Scores(shots=shots, batch_sizes=batch_sizes, versions=dict(output.get("versions") or {}))
    labels: dict[tuple[str, str, str], str] = {}
    for task, entries in output["results"].items():
        metrics: dict[str, dict[str, Any]] = {}
        for key, value in entries.items():
            metric, sign, chosen = key.rpartition(",")
            if not sign or metric.endswith("_stderr") or not isinstance(value, Real):
                continue
            # Without lm-eval's filter, except for the second and further filters of the same metric.
            label = metric if metric not in metrics else key
            labels[task, metric, chosen] = label
            error = entries.get(f"{metric}_stderr,{chosen}")
            stderr = float(error) if isinstance(error, Real) else None
            metrics[label] = {"value": float(value), "stderr": stderr, "n": int(entries["sample_len"])}
            better = (output.get("higher_is_better") or {}).get(task, {}).get(metric)
            if better is not None:
                scores.better[task, label] = bool(better)
        if metrics:
            scores.results[task] = metrics
    for task, samples in output["samples"].items():
        for sample in samples:
            row = _sample(task, sample)
            for metric in sample["metrics"]:
                label, value = labels.get((task, metric, sample["filter"])), sample[metric]
                if label is not None and isinstance(value, Real):
                    scores.documents.setdefault((task, label), {})[sample["doc_id"]] = float(value)
                    row["scores"][label] = float(value)
            scores.samples.append(row)
    scores.samples.sort(key=lambda row: (row["task"], row["doc_id"], row["filter"]))
    return scores


def _sample(task: str, sample: dict[str, Any]) -> dict[str, Any]:
    """A row of the per-sample log, its scores still empty.

    `answer` is the text that was generated, or the likeliest choice; `choices` are then all, with log-likelihoods.
    """
    arguments = sample["arguments"]
    prompts = [args[0] for args in arguments]
    row: dict[str, Any] = {
        "task": task,
        "doc_id": sample["doc_id"],
        "prompt": prompts[0] if len(set(prompts)) == 1 else prompts,
        "target": _plain(sample["target"]),
        "filter": sample["filter"],
    }
    answers = [each[0] for each in sample["resps"]]
    pairs = zip(answers, arguments, strict=True)
    if all(isinstance(answer, (tuple, list)) and len(args) > 1 for answer, args in pairs):
        # One choice may be told from another by its continuation, or, as in WinoGrande, by its context.
        texts = [args[1] if len(set(prompts)) == 1 else args[0] + args[1] for args in arguments]
        likely = [float(answer[0]) for answer in answers]
        row["answer"] = texts[max(range(len(likely)), key=likely.__getitem__)]
        row["choices"] = [{"text": text, "log_likelihood": value} for text, value in zip(texts, likely, strict=True)]
    else:
        row["answer"] = _plain(answers[0] if len(answers) == 1 else answers)
    row["scores"] = {}
    return row


def _plain(value: Any) -> Any:
    if isinstance(value, (str, int, float, bool)) or value is None:
        return value
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else str(value)


def slug(name: str) -> str:
    """A name that every file system takes, another one for each name."""
    plain = re.sub(r"[^A-Za-z0-9._=-]+", "_", name).strip("._")[:80]
    return plain if plain == name else f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def by_task(samples: Sequence[dict[str, Any]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """(task, its rows) of a per-sample log."""
    tasks: dict[str, list[dict[str, Any]]] = {}
    for row in samples:
        tasks.setdefault(row["task"], []).append(row)
    yield from tasks.items()


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
