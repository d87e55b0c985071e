"""`--fail-under TASK:METRIC=VALUE`: a result that must be reached."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from braces_cli.core.utils.errors import ConfigError, near_misses
from braces_cli.evaluation import task_catalog
from braces_cli.evaluation.scores import AVERAGE
from braces_cli.evaluation.settings import Threshold
from braces_cli.evaluation.task_loading import TaskUnit


def check_tasks(thresholds: Sequence[Threshold], selection: task_catalog.Selection) -> None:
    """Before anything is built: each threshold's task is among `--tasks`.

    Raises:
        ConfigError: one is not.
    """
    known = list(dict.fromkeys([*selection.names, *selection.leaves, *selection.native, *selection.averaged]))
    for each in thresholds:
        if each.task not in known:
            hint = near_misses(each.task, known) or f"Evaluated: {', '.join(known)}."
            raise ConfigError(f"`{each.task}` is not evaluated", where="--fail-under", hint=hint)


def check_metrics(thresholds: Sequence[Threshold], units: Sequence[TaskUnit]) -> None:
    """Before a model is loaded: each threshold's metric is one of its task's, where that can be told by then.

    Raises:
        ConfigError: one is not.
    """
    known: dict[str, list[str]] = {name: list(task.metrics) for name, task in task_catalog.NATIVE_TASKS.items()}
    known.update({name: [AVERAGE] for name in task_catalog.AVERAGED})
    for unit in units:
        known.update({name: list(task.aggregation()) for name, task in unit.tasks.items()})
    for each in thresholds:
        metrics = known.get(each.task)
        if metrics is not None and each.metric.partition(",")[0] not in metrics:
            raise _no_metric(each, metrics)


def check_reached(thresholds: Sequence[Threshold], result: dict[str, Any]) -> list[dict[str, Any]]:
    """Whether each adapter reaches each threshold, or the base, steered where asked, where there is no adapter.

    Args:
        result: the document of an evaluation.

    Returns:
        Rows `{task, metric, threshold, system, value, reached}`. Where less is better (a perplexity), reached means at
        most. What was not measured (value None) or is no number reaches nothing.
    """
    systems = [
        system for system in result["systems"] if system["adapter"] is not None or system.get("attributes")
    ] or result["systems"]
    rows = []
    for each in thresholds:
        more = result["settings"]["higher_is_better"].get(each.task, {}).get(each.metric, True)
        for system in systems:
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
    return ConfigError(f"{each.task} has no metric `{each.metric}`", where="--fail-under", hint=hint)
