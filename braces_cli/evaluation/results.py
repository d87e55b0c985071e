"""Scores of systems, and the output folder of an evaluation that stores them task by task.

run.json                        settings; `--resume` continues a run with equal settings only
parts/SYSTEM/TASK.json          scores, document by document
samples/SYSTEM/TASK.jsonl       with `--log-samples`: prompt, answer and scores of each document
results.json, results.md        the result, written last
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from braces_cli.core.errors import ConfigError, ModelError
from braces_cli.core.files import bytes_hash, finite, path_exists, remove_partial_files, write_json, write_text
from braces_cli.core.schema import Count, Kind, Size, read, stored_form

# Metric of a group: the average over its tasks.
AVERAGE = "braces_average"
# Metrics of every task with generated answers: shares of empty answers, and of those without an end.
EMPTY, TRUNCATED = "empty", "truncated"
RESULTS = "results.json"
_RUN = "run.json"


@dataclass
class Metric:
    """Value of a metric of a task.

    Attributes:
        n: number of documents.
        documents: document id -> value, if every document has one.
        units: document id -> divisor, if the metric is a ratio of sums.
        better: whether a larger value is better; None if unknown.
        chance: expected value of answers drawn at random; None if unknown.
        majority: share of the most frequent label among the correct ones; None if the task has no labels.
    """

    value: float
    stderr: float | None
    n: Count
    documents: dict[Count, float] = field(default_factory=dict)
    units: dict[Count, float] = field(default_factory=dict)
    better: bool | None = None
    chance: float | None = None
    majority: float | None = None

    def entry(self) -> dict[str, Any]:
        """Return the entry in the result."""
        levels = {"chance": self.chance, "majority": self.majority}
        known = {name: value for name, value in levels.items() if value is not None}
        return {"value": self.value, "stderr": self.stderr, "n": self.n, **known}


@dataclass
class Scores:
    """Scores of one system on one or more tasks.

    Attributes:
        results: task or group -> metric -> value.
        shots: task -> number of few-shot examples.
        versions: task -> version of its definition.
        batch_sizes: batch sizes used; several if lm-eval chose them or memory ran out.
        samples: rows of the per-sample log; not stored with the scores.
    """

    results: dict[str, dict[str, Metric]] = field(default_factory=dict)
    shots: dict[str, Count] = field(default_factory=dict)
    versions: dict[str, Any] = field(default_factory=dict)
    batch_sizes: list[Size] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)

    def add(self, other: Scores) -> None:
        """Add the results of other tasks."""
        for name in ("results", "shots", "versions"):
            getattr(self, name).update(getattr(other, name))
        self.batch_sizes = sorted({*self.batch_sizes, *other.batch_sizes})

    def add_averages(self, groups: Mapping[str, Sequence[str]]) -> None:
        """Add, for each group, the plain mean over its tasks of each task's first metric."""
        for name, tasks in groups.items():
            entries = [next(iter(self.results[task].values())) for task in tasks]
            errors = [entry.stderr for entry in entries if entry.stderr is not None]
            stderr = math.hypot(*errors) / len(entries) if len(errors) == len(entries) else None
            value = sum(entry.value for entry in entries) / len(entries)
            chances = [entry.chance for entry in entries if entry.chance is not None]
            chance = sum(chances) / len(entries) if len(chances) == len(entries) else None
            n = sum(entry.n for entry in entries)
            self.results[name] = {AVERAGE: Metric(value, stderr, n, better=True, chance=chance)}


_SETTINGS = Kind(dict[str, Any], ModelError, "Give another --output-dir, or --overwrite.", "record of a run")
_PART = Kind(Scores, ModelError, "Remove the file and resume.", "part of a result")


class Store:
    """Output folder of one run; without a folder, nothing is stored."""

    def __init__(self, folder: Path | None = None, *, log_samples: bool = False) -> None:
        self.folder = folder
        self.log_samples = log_samples

    def begin(self, identity: dict[str, Any], resume: bool) -> None:
        """Start a run or continue the stored one.

        Args:
            identity: everything that the result depends on.
            resume: keep the stored scores of a run with the same identity.
        """
        if self.folder is None:
            return
        for place in (self.folder, *self.folder.glob("parts/*"), *self.folder.glob("samples/*")):
            remove_partial_files(place)
        expected = stored_form({"log_samples": self.log_samples, **identity})
        if resume and path_exists(self.folder / _RUN):
            stored = read(_SETTINGS, self.folder / _RUN)
            other = sorted(key for key in {*stored, *expected} if stored.get(key) != expected.get(key))
            if other:
                what = f"the run in this folder has other settings ({', '.join(other)})"
                hint = "Give the same settings, another --output-dir, or --overwrite instead of --resume."
                raise ConfigError(what, where=str(self.folder), hint=hint)
            return
        for old in (_RUN, RESULTS, "results.md"):
            (self.folder / old).unlink(missing_ok=True)
        for folder in ("parts", "samples"):
            shutil.rmtree(self.folder / folder, ignore_errors=True)
        write_json(self.folder / _RUN, expected)

    def load(self, system: str, unit: str) -> Scores | None:
        """Return the stored scores of a system on a task; None if the task was not finished."""
        if self.folder is None or not path_exists(path := self._part(self.folder, system, unit)):
            return None
        return read(_PART, path)

    def save(self, system: str, unit: str, scores: Scores) -> None:
        """Store a finished task: the samples first, then the scores, which mark it as finished."""
        if self.folder is None:
            return
        if self.log_samples:
            rows: dict[str, list[str]] = {}
            for row in scores.samples:
                line = json.dumps(finite({"system": system, **row}), ensure_ascii=False, default=str)
                rows.setdefault(row["task"], []).append(line)
            for task, lines in rows.items():
                write_text(self.folder / "samples" / slug(system) / f"{slug(task)}.jsonl", "\n".join(lines) + "\n")
        # Infinite values stay as Python writes them: only `load` reads this file.
        path = self._part(self.folder, system, unit)
        write_text(path, json.dumps(asdict(replace(scores, samples=[]))) + "\n")

    @staticmethod
    def _part(folder: Path, system: str, unit: str) -> Path:
        return folder / "parts" / slug(system) / f"{slug(unit)}.json"


def slug(name: str) -> str:
    """Return a file name for `name` that every file system accepts, different for different names."""
    plain = re.sub(r"[^A-Za-z0-9._=-]+", "_", name).strip("._")[:80]
    return plain if plain == name else f"{plain}-{bytes_hash([name.encode()])[:8]}"
