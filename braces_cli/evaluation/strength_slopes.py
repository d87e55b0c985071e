"""How each metric changes with the strength of steering: the slope over s, document by document."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from braces_cli.evaluation.comparison import System
from braces_cli.scoring.prompt_effects import slope


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
