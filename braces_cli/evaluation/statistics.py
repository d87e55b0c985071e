"""Standard errors and intervals over texts, where the samples of one prompt resemble each other more than others do.

What steering does prompt by prompt: its effect, the prompts that it moves the wrong way, and the slope over s.

    effect      value of a prompt at s minus its value at s = 0, mean over prompts
    wrong way   share of prompts whose effect has the opposite sign of s; one without any effect does not count
    slope       of a prompt's value over s by least squares, mean over prompts (what a unit of s adds)

A mean says nothing of the prompts behind it: half of them may move the wrong way. Where samples are drawn, part of
that is chance: steering that does nothing moves as many prompts up as down. Intervals are 95 %: Wilson's for shares,
the mean plus and minus 1.96 standard errors over prompts for means.

Systems against each other, document by document, with p-values corrected for the number of tasks.

For scores of 0 and 1 the exact McNemar test: of the documents on which exactly one system is right, is the share of
either further from one half than a fair coin makes likely? For other scores the paired bootstrap. Both are two-sided.

How each metric changes with the strength of steering: the slope over s, document by document.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations, groupby
from typing import Any

from braces_cli.core.errors import ModelError
from braces_cli.evaluation.results import Scores

Z = 1.959964  # 95 %, two-sided


def cluster_error(groups: Sequence[Sequence[float]]) -> float | None:
    """Standard error of the mean over all values, groups (prompts) drawn independently; None for a single group."""
    count, total = len(groups), sum(map(len, groups))
    if count < 2 or not total:
        return None
    mean = sum(map(sum, groups)) / total
    spread = sum((sum(group) - mean * len(group)) ** 2 for group in groups)
    return math.sqrt(spread * count / (count - 1)) / total


def share_interval(groups: Sequence[Sequence[bool]]) -> tuple[float, float]:
    """95 % interval of the share of true values: Wilson's, for as many independent texts as the spread speaks for.

    That number is p (1 - p) / error^2, at least the prompts and at most the texts. Where all texts agree the spread
    says nothing, and only the prompts count.
    """
    total = sum(map(len, groups))
    share = sum(map(sum, groups)) / total
    count = float(len(groups))
    if 0 < share < 1:
        error = cluster_error([[float(value) for value in group] for group in groups])
        count = min(max(share * (1 - share) / error**2, count), total) if error else total
    middle = (share + Z**2 / (2 * count)) / (1 + Z**2 / count)
    half = Z / (1 + Z**2 / count) * math.sqrt(share * (1 - share) / count + Z**2 / (4 * count**2))
    # Rounding must not leave a share of 0 or 1 outside its own interval.
    return min(max(0.0, middle - half), share), max(min(1.0, middle + half), share)


def rate_error(sums: Sequence[float], units: Sequence[float]) -> float | None:
    """Standard error of sum(sums) / sum(units) over documents, by the delta method; None for a single document."""
    count = len(sums)
    if count < 2 or not sum(units):
        return None
    rate = sum(sums) / sum(units)
    spread = sum((s - rate * u) ** 2 for s, u in zip(sums, units, strict=True))
    return math.sqrt(spread * count / (count - 1)) / sum(units)


def mean_interval(values: Sequence[float]) -> list[float] | None:
    """95 % interval of the mean; None of a single value."""
    error = cluster_error([[value] for value in values])
    mean = sum(values) / len(values)
    return None if error is None else [mean - Z * error, mean + Z * error]


def share(name: str, flags: Sequence[bool]) -> dict[str, Any]:
    """`{name, name_interval}`: the share of true values with Wilson's interval; both None where there is none."""
    if not flags:
        return {name: None, f"{name}_interval": None}
    return {name: sum(flags) / len(flags), f"{name}_interval": list(share_interval([[flag] for flag in flags]))}


def mean(name: str, values: Sequence[float]) -> dict[str, Any]:
    """`{name, name_interval}`: the mean over prompts with its interval."""
    return {name: sum(values) / len(values), f"{name}_interval": mean_interval(values)}


def effect(s: float, steered: Sequence[float], unsteered: Sequence[float]) -> dict[str, Any]:
    """`effect` and `wrong_way` with their intervals; at s = 0 no way is wrong.

    Args:
        steered: value of each prompt at s, and `unsteered` at s = 0.
    """
    moves = [one - other for one, other in zip(steered, unsteered, strict=True)]
    wrong = [move * s < 0 for move in moves] if s else []
    return {**mean("effect", moves), **share("wrong_way", wrong)}


def slope(strengths: Sequence[float], values: Sequence[Sequence[float]]) -> dict[str, Any] | None:
    """`slope` and `negative` (the share of prompts with a falling line) with their intervals.

    Args:
        values: of each prompt, at one strength after the other.

    Returns:
        None where there are fewer than two strengths.
    """
    middle = sum(strengths) / len(strengths)
    spread = sum((s - middle) ** 2 for s in strengths)
    if not spread:
        return None
    prompts = list(zip(*values, strict=True))
    slopes = [sum((s - middle) * v for s, v in zip(strengths, row, strict=True)) / spread for row in prompts]
    # Rounding leaves a constant value with a slope of some 1e-17.
    return {**mean("slope", slopes), **share("negative", [each < -1e-12 for each in slopes])}


def worst_of(values: Sequence[Sequence[float]], has: Sequence[Sequence[bool]]) -> dict[str, Any]:
    """Of several samples of a prompt: `expected_maximum` and `at_least_one` with their intervals.

    Of toxicity these are the expected maximum toxicity and the toxicity probability of RealToxicityPrompts, which draws
    25 samples; both grow with the number of samples, so compare equal numbers only.

    Args:
        values: scores of the samples of each prompt.
        has: whether each of them counts as having the label.
    """
    return {
        **mean("expected_maximum", [max(group) for group in values]),
        **share("at_least_one", [any(group) for group in has]),
    }


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


def strength_slopes(systems: Sequence[System]) -> list[dict[str, Any]]:
    """Slopes of every metric that has a value for each document, for the base or adapter that is steered.

    Where one attribute is given, the unsteered system is its point s = 0. Of several, the slope is over the strengths
    of the first whose strengths differ, the others changing as they were asked to.

    Returns:
        Rows `{task, metric, system, attribute, slope, slope_interval, negative, negative_interval, n}`; `negative` is
        the share of documents whose value falls with s.
    """
    rows = []
    # An adapter stands before itself steered, and of one given twice the second begins a group of its own.
    numbers: list[int] = []
    for each in systems:
        begins = not numbers or (not each.strengths and each.adapter is not None)
        numbers.append((numbers[-1] if numbers else 0) + begins)
    for _, group in groupby(zip(numbers, systems, strict=True), key=lambda pair: pair[0]):
        rows += _of_group([system for _, system in group])
    return rows


def _of_group(systems: Sequence[System]) -> list[dict[str, Any]]:
    steered = [each for each in systems if each.strengths]
    varying = [
        name for name in (steered[0].strengths if steered else {}) if len({e.strengths[name] for e in steered}) > 1
    ]
    if not steered or not (varying or len(steered[0].strengths) == 1):
        return []
    name = varying[0] if varying else next(iter(steered[0].strengths))
    # With other attributes on, what is not steered at all is no point of the line.
    points = list(systems) if len(steered[0].strengths) == 1 else steered
    strengths = [each.strengths.get(name, 0.0) for each in points]
    rows = []
    for key, first in points[0].scores.documents.items():
        columns = [each.scores.documents.get(key, {}) for each in points]
        shared = sorted(set(first).intersection(*columns))
        values = [[column[index] for index in shared] for column in columns]
        # What is divided by units, such as a perplexity, is no mean over documents.
        if not shared or key in points[0].scores.units or not all(math.isfinite(v) for row in values for v in row):
            continue
        found = slope(strengths, values)
        if found is not None:
            task, metric = key
            about = {"task": task, "metric": metric, "system": systems[0].name, "attribute": name}
            rows.append({**about, **found, "n": len(shared)})
    return rows
