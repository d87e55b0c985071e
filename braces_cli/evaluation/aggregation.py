"""Results that are made of other results: averages over the tasks of a group, and parts of a task's documents."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from braces_cli.evaluation import task_catalog
from braces_cli.evaluation.scores import Scores
from braces_cli.evaluation.task_loading import Unit
from braces_cli.evaluation.tasks import popqa

AVERAGE = "braces_average"
_SPLITS: dict[str, Callable[[dict[str, Any]], str | None]] = {
    "relation": popqa.relation,
    "popularity": popqa.popularity,
}


def add_averages(scores: Scores, selection: task_catalog.Selection) -> None:
    """For each of our groups asked for, the plain mean over its tasks of each task's first metric."""
    for name in task_catalog.AVERAGED:
        if name not in selection.groups:
            continue
        members = [next(iter(scores.results[task].items())) for task in selection.groups[name]]
        errors = [entry["stderr"] for _, entry in members]
        stderr = None if None in errors else math.sqrt(sum(error**2 for error in errors)) / len(members)
        value = sum(entry["value"] for _, entry in members) / len(members)
        scores.results[name] = {
            AVERAGE: {"value": value, "stderr": stderr, "n": sum(entry["n"] for _, entry in members)}
        }
        scores.better[name, AVERAGE] = True


def add_splits(scores: Scores, selection: task_catalog.Selection, units: Sequence[Unit]) -> None:
    """For each split asked for, results of the task's documents part by part: `popqa:relation=director`."""
    tasks = {name: task for unit in units for name, task in unit.tasks.items()}
    for name, by in task_catalog.SPLITS.items():
        for task in selection.groups.get(name, ()):
            docs = tasks[task].eval_docs
            for metric in list(scores.results.get(task, {})):
                _split(scores, task, metric, by, docs)


def _split(scores: Scores, task: str, metric: str, by: str, docs: Any) -> None:
    parts: dict[str, dict[int, float]] = {}
    for index, value in scores.documents.get((task, metric), {}).items():
        part = _SPLITS[by](docs[index])
        if part is not None:
            parts.setdefault(part, {})[index] = value
    for part in sorted(parts, key=popqa.views_from if by == "popularity" else str):
        name = f"{task}:{by}={part}"
        values = list(parts[part].values())
        scores.results.setdefault(name, {})[metric] = {
            "value": sum(values) / len(values),
            "stderr": _stderr(values),
            "n": len(values),
        }
        scores.documents[name, metric] = parts[part]
        if (task, metric) in scores.better:
            scores.better[name, metric] = scores.better[task, metric]


def _stderr(values: Sequence[float]) -> float | None:
    """Standard error of a mean."""
    count = len(values)
    if count < 2:
        return None
    mean = sum(values) / count
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1) / count)
