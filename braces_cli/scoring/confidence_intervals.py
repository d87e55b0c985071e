"""Standard errors and intervals over texts, where the samples of one prompt resemble each other more than others do."""

from __future__ import annotations

import math
from collections.abc import Sequence

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
