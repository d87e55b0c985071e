"""Statistics of evaluations: standard errors, intervals, comparisons of systems, and slopes over the strength.

Texts of one prompt are correlated, so errors are those over prompts. Intervals are 95 %: Wilson's for shares, the mean
plus and minus 1.96 standard errors for means.

    effect       value of a prompt at s minus its value at s = 0, mean over prompts
    wrong_way    share of prompts with an effect of the opposite sign of s; part of it is chance if texts are sampled
    slope        slope of a prompt's value over s by least squares, mean over prompts
    comparison   systems document by document: exact McNemar test for scores of 0 and 1, else paired bootstrap, both
                 two-sided; p-values are corrected over all of one run: systems, strengths, tasks, metrics (Holm)
"""

import math
from collections.abc import Sequence
from itertools import combinations, groupby
from typing import Any

from braces_cli.evaluation.systems import System

Z = 1.959964  # 95 %, two-sided


def cluster_error(groups: Sequence[Sequence[float]]) -> float | None:
    """Return the standard error of the mean over all values of independent groups (prompts); None for one group."""
    return rate_error([sum(group) for group in groups], [len(group) for group in groups])


def share_interval(groups: Sequence[Sequence[bool]]) -> tuple[float, float]:
    """Return Wilson's 95 % interval of the share of true values, for the effective number of independent texts.

    That number is p (1 - p) / error^2, at least the number of prompts and at most the number of texts. If all texts
    agree, it is the number of prompts.
    """
    total = sum(map(len, groups))
    share = sum(map(sum, groups)) / total
    count = float(len(groups))
    if 0 < share < 1:
        error = cluster_error([[float(value) for value in group] for group in groups])
        count = min(max(share * (1 - share) / error**2, count), total) if error else total
    middle = (share + Z**2 / (2 * count)) / (1 + Z**2 / count)
    half = Z / (1 + Z**2 / count) * math.sqrt(share * (1 - share) / count + Z**2 / (4 * count**2))
    # Rounding must not put a share of 0 or 1 outside its interval.
    return min(max(0.0, middle - half), share), max(min(1.0, middle + half), share)


def rate_error(sums: Sequence[float], units: Sequence[float]) -> float | None:
    """Return the standard error of sum(sums) / sum(units) over documents (delta method); None for one document."""
    count = len(sums)
    if count < 2 or not sum(units):
        return None
    rate = sum(sums) / sum(units)
    spread = sum((s - rate * u) ** 2 for s, u in zip(sums, units, strict=True))
    return math.sqrt(spread * count / (count - 1)) / sum(units)


def share(name: str, flags: Sequence[bool]) -> dict[str, Any]:
    """Return `{name, name_interval}`, the share of true values with Wilson's interval; both None without values."""
    if not flags:
        return {name: None, f"{name}_interval": None}
    return {name: sum(flags) / len(flags), f"{name}_interval": list(share_interval([[flag] for flag in flags]))}


def mean(name: str, values: Sequence[float]) -> dict[str, Any]:
    """Return `{name, name_interval}`, the mean over prompts with its interval; None for one prompt."""
    value, error = sum(values) / len(values), cluster_error([[value] for value in values])
    return {name: value, f"{name}_interval": None if error is None else [value - Z * error, value + Z * error]}


def effect(s: float, steered: Sequence[float], unsteered: Sequence[float]) -> dict[str, Any]:
    """Return `effect` and `wrong_way` with their intervals, from the values of each prompt; no `wrong_way` at s = 0."""
    moves = [one - other for one, other in zip(steered, unsteered, strict=True)]
    wrong = [move * s < 0 for move in moves] if s else []
    return {**mean("effect", moves), **share("wrong_way", wrong)}


def slope(strengths: Sequence[float], values: Sequence[Sequence[float]]) -> dict[str, Any] | None:
    """Return `slope` and `negative` (share of prompts with a negative slope) with their intervals.

    Args:
        values: for each strength, the value of each prompt.

    Returns:
        None if there are fewer than two strengths.
    """
    middle = sum(strengths) / len(strengths)
    spread = sum((s - middle) ** 2 for s in strengths)
    if not spread:
        return None
    prompts = list(zip(*values, strict=True))
    slopes = [sum((s - middle) * v for s, v in zip(strengths, row, strict=True)) / spread for row in prompts]
    # By rounding, a constant value has a slope of about 1e-17.
    return {**mean("slope", slopes), **share("negative", [each < -1e-12 for each in slopes])}


# A corrected p below this is significant.
LEVEL = 0.05
RESAMPLES = 10_000
# Random indices drawn at a time (80 MB).
_DRAWN_AT_ONCE = 10_000_000


def compare(systems: Sequence[System], seed: int) -> list[dict[str, Any]]:
    """Compare every system with the first, the base; then adapters with each other, and each with itself steered.

    Returns:
        Rows `{task, metric, from, to, difference, n, p_value, p_holm, significant, rises, falls}`; p is null for
        metrics without a value for each document. `rises` and `falls` are the shares of documents with a larger and a
        smaller value, with Wilson's intervals.
    """
    rows: list[dict[str, Any]] = []
    for one, other in combinations(systems, 2):
        # Both differ in one thing only: in the adapter, or in the steering.
        comparable = not one.strengths and (not other.strengths or one.adapter is other.adapter)
        if one is not systems[0] and not comparable:
            continue
        for task, metrics in one.scores.results.items():
            for name, before in metrics.items():
                after = other.scores.results[task][name]
                shared = sorted(before.documents.keys() & after.documents.keys())
                a, b = ([metric.documents[index] for index in shared] for metric in (before, after))
                weights = [before.units[index] for index in shared] if before.units else None
                row: dict[str, Any] = {"task": task, "metric": name, "from": one.name, "to": other.name, "n": before.n}
                row |= {"difference": after.value - before.value, "p_value": p_value(a, b, weights, seed)}
                row |= share("rises", [y > x for x, y in zip(a, b, strict=True)])
                rows.append(row | share("falls", [y < x for x, y in zip(a, b, strict=True)]))
    tested = [row for row in rows if row["p_value"] is not None]
    for row in rows:
        row |= {"p_holm": None, "significant": None}
    for row, corrected in zip(tested, holm([row["p_value"] for row in tested]), strict=True):
        row |= {"p_holm": corrected, "significant": corrected < LEVEL}
    return rows


def significance_label(row: dict[str, Any]) -> str:
    """Return the significance of a comparison in words."""
    if row["p_value"] is None:
        return "no test"
    if row["difference"] == 0 and row["p_value"] == 1:
        return "no difference"
    return "significant" if row["significant"] else "not significant"


def mcnemar(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the exact p-value for paired scores of 0 and 1; 1 if all scores agree."""
    from scipy.stats import binomtest

    only_a = sum(x > y for x, y in zip(a, b, strict=True))
    only_b = sum(x < y for x, y in zip(a, b, strict=True))
    if only_a + only_b == 0:
        return 1.0
    return float(binomtest(only_a, only_a + only_b, 0.5).pvalue)


def paired_bootstrap(
    a: Sequence[float], b: Sequence[float], weights: Sequence[float] | None = None, seed: int = 0
) -> float:
    """Return the p-value of a difference of means, or of ratios `sum(a) / sum(weights)` if weights are given.

    Documents are drawn with replacement from the centred differences. p is the share of draws at least as far from zero
    as the measured difference, which counts as a draw.

    Args:
        weights: divisor of each document, such as its number of bytes.
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
    extreme, size = 0, max(1, _DRAWN_AT_ONCE // count)
    for start in range(0, RESAMPLES, size):
        drawn = generator.integers(count, size=(min(size, RESAMPLES - start), count))
        ratio = centred[drawn].sum(axis=1) / units[drawn].sum(axis=1)
        # A rounding error must not decide whether a draw equals the measured difference.
        extreme += int((np.abs(ratio) >= abs(measured) * (1 - 1e-9)).sum())
    # With few documents the bootstrap can be too small; flipping the signs of n differences gives at least this.
    return max((extreme + 1) / (RESAMPLES + 1), 2.0 ** (1 - count))


def p_value(a: Sequence[float], b: Sequence[float], weights: Sequence[float] | None, seed: int) -> float | None:
    """Return the p-value of paired scores of documents; None without any, or if a score is not finite."""
    if not a or not all(map(math.isfinite, (*a, *b))):
        return None
    if weights is None and {*a, *b} <= {0.0, 1.0}:
        return mcnemar(a, b)
    return paired_bootstrap(a, b, weights, seed)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number (Holm 1979): the k-th smallest of m times m - k + 1."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    corrected = [0.0] * len(p_values)
    highest = 0.0
    for place, index in enumerate(order):
        highest = max(highest, min(1.0, p_values[index] * (len(p_values) - place)))
        corrected[index] = highest
    return corrected


def strength_slopes(systems: Sequence[System]) -> list[dict[str, Any]]:
    """Return the slope over s of every metric with a value for each document, for each steered base or adapter.

    With one attribute, the unsteered system is the point s = 0. With several, s is the strength of the first attribute
    whose strengths differ.

    Returns:
        Rows `{task, metric, system, attribute, slope, slope_interval, negative, negative_interval, n}`.
    """
    rows = []
    for _, group in groupby(systems, key=lambda system: id(system.adapter)):
        points = list(group)
        system, names = points[0].name, list(points[-1].strengths)
        if len(names) > 1:
            # With several attributes, the unsteered system is not on the line.
            points = [each for each in points if each.strengths]
            names = [name for name in names if len({each.strengths[name] for each in points}) > 1]
        if not names:
            continue
        strengths = [each.strengths.get(names[0], 0.0) for each in points]
        for task, metrics in points[0].scores.results.items():
            for metric, first in metrics.items():
                documents = [each.scores.results[task][metric].documents for each in points]
                shared = sorted(set(documents[0]).intersection(*documents))
                values = [[each[index] for index in shared] for each in documents]
                # A ratio of sums, such as a perplexity, is not a mean over documents.
                if not shared or first.units or not all(math.isfinite(v) for row in values for v in row):
                    continue
                found = slope(strengths, values)
                if found is not None:
                    about = {"task": task, "metric": metric, "system": system, "attribute": names[0]}
                    rows.append({**about, **found, "n": len(shared)})
    return rows
