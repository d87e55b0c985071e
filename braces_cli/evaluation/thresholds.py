"""`--fail-under TASK:METRIC=VALUE`: a result that must be reached."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from braces_cli.core.utils.errors import ConfigError, near_misses
from braces_cli.evaluation import native_tasks, task_catalog
from braces_cli.evaluation.aggregation import AVERAGE
from braces_cli.evaluation.task_loading import Unit

_WHERE = "--fail-under"


@dataclass(frozen=True)
class Threshold:
    """A metric of a task and the value that it must reach."""

    task: str
    metric: str
    value: float


def parse_thresholds(values: Sequence[str]) -> list[Threshold]:
    """`TASK:METRIC=VALUE` of each value; TASK may itself hold `:` and `=` (`popqa:relation=director`).

    Raises:
        ConfigError: another form.
    """
    found = []
    for value in values:
        head, sign, number = value.strip().rpartition("=")
        task, colon, metric = head.rpartition(":")
        try:
            limit = float(number)
        except ValueError:
            limit = math.nan
        if not (sign and colon and task.strip() and metric.strip() and math.isfinite(limit)):
            hint = "Such as --fail-under popqa:acc=0.3."
            raise ConfigError(f"`{value}` is not TASK:METRIC=VALUE", where=_WHERE, hint=hint)
        found.append(Threshold(task.strip(), metric.strip(), limit))
    return found


def check_tasks(thresholds: Sequence[Threshold], selection: task_catalog.Selection) -> None:
    """Before anything is built: each threshold's task is among those asked for.

    Raises:
        ConfigError: one is not.
    """
    averaged = [name for name in task_catalog.AVERAGED if name in selection.groups]
    known = list(dict.fromkeys([*selection.names, *selection.leaves, *selection.own, *averaged]))
    for each in thresholds:
        task = each.task.partition(":")[0]
        if task not in known:
            hint = near_misses(task, known) or f"Asked for: {', '.join(known)}."
            raise ConfigError(f"`{each.task}` is not measured", where=_WHERE, hint=hint)


def check_metrics(thresholds: Sequence[Threshold], units: Sequence[Unit]) -> None:
    """Before a model is loaded: each threshold's metric is one of its task's, where that can be told by then.

    Raises:
        ConfigError: one is not.
    """
    known: dict[str, list[str]] = {name: list(task.metrics) for name, task in native_tasks.TASKS.items()}
    known.update({name: [AVERAGE] for name in task_catalog.AVERAGED})
    for unit in units:
        known.update({name: list(task.aggregation()) for name, task in unit.tasks.items()})
    for each in thresholds:
        metrics = known.get(each.task.partition(":")[0])
        if metrics is not None and each.metric.partition(",")[0] not in metrics:
            raise _no_metric(each, metrics)


def check_reached(thresholds: Sequence[Threshold], result: dict[str, Any]) -> list[dict[str, Any]]:
    """What became of each threshold, for each adapter, or for the base where there is none.

    Args:
        result: the document of an evaluation.

    Returns:
        Rows `{task, metric, threshold, system, value, reached}`. Where less is better (a perplexity), reached means at
        most. What was not measured (value None) or is no number reaches nothing.
    """
    judged = [system for system in result["systems"] if system["adapter"] is not None] or result["systems"]
    rows = []
    for each in thresholds:
        more = result["settings"]["higher_is_better"].get(each.task, {}).get(each.metric, True)
        for system in judged:
            entry = system["results"].get(each.task, {}).get(each.metric)
            value = None if entry is None else entry["value"]
            reached = value is not None and (value >= each.value if more else value <= each.value)
            rows.append(
                {
                    "task": each.task,
                    "metric": each.metric,
                    "threshold": each.value,
                    "system": system["name"],
                    "value": value,
                    "reached": reached,
                }
            )
    return rows


def _no_metric(each: Threshold, known: Sequence[str]) -> ConfigError:
    hint = near_misses(each.metric, known) or f"It has {', '.join(known)}."
    return ConfigError(f"{each.task} has no metric `{each.metric}`", where=_WHERE, hint=hint)
