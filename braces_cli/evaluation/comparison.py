"""Systems against each other, document by document, with p-values corrected for the number of tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from braces_cli.core.utils.errors import BracesError
from braces_cli.evaluation.scores import Scores
from braces_cli.evaluation.significance import holm, p_value

# A corrected p below it is called significant.
LEVEL = 0.05


@dataclass
class System:
    """A row of the result: `adapter` is the adapter as the user named it, None for the bare base."""

    name: str
    adapter: str | None
    scores: Scores
    method: str | None = None
    sha256: str | None = None


def compare(systems: Sequence[System], seed: int) -> list[dict[str, Any]]:
    """Every later system against every earlier one: the base against each adapter, then adapters among themselves.

    Returns:
        Rows `{task, metric, from, to, difference, n, p_value, p_holm, significant}`; p is None where a metric has no
        score for each document.
    """
    pairs = sorted(combinations(range(len(systems)), 2))
    return [row for one, other in pairs for row in _pair(systems[one], systems[other], seed)]


def _pair(one: System, other: System, seed: int) -> list[dict[str, Any]]:
    rows = []
    for task, metrics in one.scores.results.items():
        for metric, entry in metrics.items():
            there = other.scores.results.get(task, {}).get(metric)
            if there is None:
                raise BracesError(f"{other.name} has no {metric}", where=task, hint="This is a fault of braces.")
            key = (task, metric)
            a, b = one.scores.documents.get(key), other.scores.documents.get(key)
            rows.append(
                {
                    "task": task,
                    "metric": metric,
                    "from": one.name,
                    "to": other.name,
                    "difference": there["value"] - entry["value"],
                    "n": entry["n"],
                    "p_value": p_value(a, b, one.scores.units.get(key), seed) if a and b else None,
                }
            )
    _correct(rows)
    return rows


def _correct(rows: list[dict[str, Any]]) -> None:
    """Add `p_holm` and `significant`: Holm over tasks, each metric of a task in the place of the task.

    A task's further metrics are other readings of the same answers, so they do not count as further tasks: a metric is
    corrected together with the first metric of each other task. Parts of a task (`popqa:relation=...`) are a family
    apart, or asking for them would weaken what is said of the whole.
    """
    firsts: dict[str, float] = {}
    for row in rows:
        if row["p_value"] is not None:
            firsts.setdefault(row["task"], row["p_value"])
    for row in rows:
        if row["p_value"] is None:
            row.update(p_holm=None, significant=None)
            continue
        family = _family(row["task"])
        others = [p for task, p in firsts.items() if task != row["task"] and _family(task) == family]
        row["p_holm"] = holm([row["p_value"], *others])[0]
        row["significant"] = row["p_holm"] < LEVEL


def _family(task: str) -> str:
    """Empty for tasks; what a part of a task is a part by (`popqa:relation`) for parts."""
    head, sign, _ = task.partition("=")
    return head if sign else ""


def verdict(row: dict[str, Any]) -> str:
    """A comparison in words."""
    if row["p_value"] is None:
        return "no test"
    if row["difference"] == 0 and row["p_value"] == 1:
        return "no difference"
    return "significant" if row["significant"] else "not significant"
