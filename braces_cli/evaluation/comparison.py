"""Systems against each other, document by document, with p-values corrected for the number of tasks.

For scores of 0 and 1 the exact McNemar test: of the documents on which exactly one system is right, is the share of
either further from one half than a fair coin makes likely? For other scores the paired bootstrap. Both are two-sided.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from braces_cli.core.utils.errors import ModelError
from braces_cli.evaluation.scores import Scores
from braces_cli.scoring.prompt_effects import share

# A corrected p below it is called significant.
LEVEL = 0.05
RESAMPLES = 10_000
# Random indices drawn at a time: 80 MB.
_DRAWN_AT_ONCE = 10_000_000


@dataclass
class System:
    """A row of the result: `adapter` is the adapter as the user named it, None for the base.

    `strengths` are those of the attributes that it is steered by, none where it is not steered.
    """

    name: str
    adapter: str | None
    scores: Scores
    method: str | None = None
    sha256: str | None = None
    strengths: dict[str, float] = field(default_factory=dict)


def compare(systems: Sequence[System], seed: int) -> list[dict[str, Any]]:
    """Every system against the first, the base; then adapters among themselves, and each against itself steered.

    Returns:
        Rows `{task, metric, from, to, difference, n, p_value, p_holm, significant}`; p is None where a metric has no
        score for each document. Where it has one also `rises` and `falls`, the shares of documents that move either
        way, with Wilson's 95 % intervals.
    """
    pairs = combinations(systems, 2)
    return [row for one, other in pairs if _compared(one, other, systems[0]) for row in _pair(one, other, seed)]


def _compared(one: System, other: System, first: System) -> bool:
    """Whether the difference of two systems is of one thing: of adapters, or of steering."""
    return one is first or (not one.strengths and (not other.strengths or one.adapter == other.adapter))


def _pair(one: System, other: System, seed: int) -> list[dict[str, Any]]:
    rows = []
    for task, metrics in one.scores.results.items():
        for metric, entry in metrics.items():
            there = other.scores.results.get(task, {}).get(metric)
            if there is None:
                hint = "Where stored parts were resumed, one of them is damaged: start anew with --overwrite."
                raise ModelError(f"{other.name} has no {metric}", where=task, hint=hint)
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
                    **_moves(a or {}, b or {}),
                }
            )
    _correct(rows)
    return rows


def _moves(a: dict[int, float], b: dict[int, float]) -> dict[str, Any]:
    shared = sorted(a.keys() & b.keys())
    return {
        **share("rises", [b[index] > a[index] for index in shared]),
        **share("falls", [b[index] < a[index] for index in shared]),
    }


def _correct(rows: list[dict[str, Any]]) -> None:
    """Add `p_holm` and `significant`: Holm over tasks, each metric of a task in the place of the task.

    A task's further metrics are other readings of the same answers, so they do not count as further tasks: a metric is
    corrected together with the first metric of each other task.
    """
    firsts: dict[str, float] = {}
    for row in rows:
        if row["p_value"] is not None:
            firsts.setdefault(row["task"], row["p_value"])
    for row in rows:
        if row["p_value"] is None:
            row.update(p_holm=None, significant=None)
            continue
        others = [p for task, p in firsts.items() if task != row["task"]]
        row["p_holm"] = holm([row["p_value"], *others])[0]
        row["significant"] = row["p_holm"] < LEVEL


def significance_label(row: dict[str, Any]) -> str:
    """A comparison in words."""
    if row["p_value"] is None:
        return "no test"
    if row["difference"] == 0 and row["p_value"] == 1:
        return "no difference"
    return "significant" if row["significant"] else "not significant"


def mcnemar(a: Sequence[float], b: Sequence[float]) -> float:
    """Exact p-value for paired scores of 0 and 1; 1 where the two agree everywhere."""
    from scipy.stats import binomtest

    only_a = sum(x > y for x, y in zip(a, b, strict=True))
    only_b = sum(x < y for x, y in zip(a, b, strict=True))
    if only_a + only_b == 0:
        return 1.0
    return float(binomtest(only_a, only_a + only_b, 0.5).pvalue)


def paired_bootstrap(
    a: Sequence[float], b: Sequence[float], weights: Sequence[float] | None = None, seed: int = 0
) -> float:
    """p-value for a difference of means, or of ratios `sum(a) / sum(weights)` where weights are given.

    Documents are drawn anew with replacement; the differences are centred first, so that the draws show what chance
    alone would do. p is the share of draws at least as far from zero as what was measured, itself counted.

    Args:
        weights: units that a document counts for (its bytes, say); 1 each by default.
    """
    import numpy as np

    difference = np.asarray(b, dtype=float) - np.asarray(a, dtype=float)
    units = np.ones_like(difference) if weights is None else np.asarray(weights, dtype=float)
    count = len(difference)
    if not difference.any():
        return 1.0
    measured = difference.sum() / units.sum()
    centred = difference - measured * units
    generator = np.random.default_rng(seed)
    extreme = 0
    left = RESAMPLES
    while left:
        size = min(left, max(1, _DRAWN_AT_ONCE // count))
        drawn = generator.integers(count, size=(size, count))
        ratio = centred[drawn].sum(axis=1) / units[drawn].sum(axis=1)
        # A rounding error must not decide whether a draw equals what was measured.
        extreme += int((np.abs(ratio) >= abs(measured) * (1 - 1e-9)).sum())
        left -= size
    # Few documents resemble each other by chance, and then every draw does; flipping the signs of n differences
    # could never give less than this.
    return max((extreme + 1) / (RESAMPLES + 1), 2.0 ** (1 - count))


def p_value(
    a: dict[int, float], b: dict[int, float], weights: dict[int, float] | None = None, seed: int = 0
) -> float | None:
    """p-value from scores by document id, over the documents that both have.

    None where there is no such document, or a score is not finite.
    """
    shared = sorted(a.keys() & b.keys())
    left, right = [a[i] for i in shared], [b[i] for i in shared]
    if not shared or not all(map(math.isfinite, left + right)):
        return None
    if weights is None and set(left + right) <= {0.0, 1.0}:
        return mcnemar(left, right)
    return paired_bootstrap(left, right, None if weights is None else [weights[i] for i in shared], seed)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number (Holm 1979), in the order given: the k-th smallest of m times m - k + 1."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    corrected = [0.0] * len(p_values)
    highest = 0.0
    for place, index in enumerate(order):
        highest = max(highest, min(1.0, p_values[index] * (len(p_values) - place)))
        corrected[index] = highest
    return corrected
