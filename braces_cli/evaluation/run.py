"""`braces eval` as one call: a base and its adapters, side by side, on the same documents."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from braces_cli.core.adapter import load_adapter, read_config, read_tensors
from braces_cli.core.errors import BracesError, ConfigError
from braces_cli.core.progress import Report, silent
from braces_cli.core.session import LoadOptions, Session, adapter_folder, base_name, open_session
from braces_cli.core.versions import versions
from braces_cli.evaluation import catalog, harness, perplexity
from braces_cli.evaluation.significance import p_value
from braces_cli.evaluation.task_data import check_fields, parse_task_data, read_task_rows, read_texts, write_override

logger = logging.getLogger("braces")

# Sequences a forward pass for perplexity, where lm-eval was left to choose its own.
_BATCH = 8


@dataclass(frozen=True)
class EvalSettings:
    """What to measure and how.

    Attributes:
        tasks: names, each one or several with commas between them.
        task_data: `NAME=FILE` values.
        limit: documents of each task, from the front; None for all.
        num_fewshot: examples in front of each document; None is the task's own number.
        batch_size: sequences a forward pass, or `auto`.
        seed: of every random choice; None takes lm-eval's own seeds.
        base: measure the bare base, too.
    """

    tasks: Sequence[str]
    task_data: Sequence[str] = ()
    limit: int | None = None
    num_fewshot: int | None = None
    batch_size: int | str = 8
    seed: int | None = None
    base: bool = True

    def __post_init__(self) -> None:
        size = self.batch_size
        if size != "auto" and not (isinstance(size, int) and size >= 1):
            raise ConfigError(f"`{size}` is no batch size", where="--batch-size", hint="Give 1 or more, or auto.")

    @property
    def seeds(self) -> dict[str, int]:
        return dict(harness.SEEDS) if self.seed is None else dict.fromkeys(harness.SEEDS, self.seed)


@dataclass
class System:
    """A row of the result: `adapter` is the adapter as the user named it, None for the bare base."""

    name: str
    adapter: str | None
    scores: harness.Scores
    units: dict[tuple[str, str], dict[int, float]]


def check_settings(settings: EvalSettings) -> tuple[catalog.Selection, dict[str, Path], dict[str, list[Any]]]:
    """Resolve the tasks and read and check every local file; loads no model and fetches nothing.

    Returns:
        The selection, task -> file, and task -> its rows (texts for `perplexity`).

    Raises:
        ConfigError: an unknown task, task data for none of them, no data for `perplexity`.
        DataError: a file that is missing, broken or lacks fields.
    """
    selection = catalog.select(settings.tasks)
    given = parse_task_data(settings.task_data, selection.known())
    files = {member: file for name, file in given.items() for member in selection.members(name)}
    # A file for a task itself beats one for its group.
    files.update({name: file for name, file in given.items() if name in selection.leaves or name == perplexity.NAME})
    if selection.perplexity and perplexity.NAME not in files:
        hint = "Give --task-data perplexity=FILE (.txt, or rows with `text`)."
        raise ConfigError("perplexity has no data of its own", where="--tasks", hint=hint)
    rows: dict[str, list[Any]] = {}
    for name, file in files.items():
        if name == perplexity.NAME:
            rows[name] = read_texts(file)
        else:
            rows[name] = read_task_rows(file)
            check_fields(name, rows[name])
    return selection, files, rows


def run_evaluation(
    model: str | None,
    adapters: Sequence[str],
    options: LoadOptions,
    settings: EvalSettings,
    report: Report = silent,
) -> dict[str, Any]:
    """Measure the base, then each adapter on it, and compare them document by document.

    Returns:
        `{systems, comparisons, settings}` as DESIGN 3.1 has it.

    Raises:
        ConfigError: see `check_settings`; nothing to measure; no model.
        DataError: see `check_settings`; data that cannot be fetched.
        ModelError: the base or an adapter cannot be loaded, or an adapter does not fit.
    """
    if not settings.base and not adapters:
        raise ConfigError("nothing to measure", where="--no-base", hint="Give an --adapter, or leave --no-base out.")
    # What can be wrong is looked at from the cheapest to the dearest: settings, files, adapters, tasks, weights.
    selection, files, rows = check_settings(settings)
    for name in adapters:
        folder = adapter_folder(name)
        read_tensors(folder, read_config(folder))
    base = base_name(model, adapters[0] if adapters else None)
    with tempfile.TemporaryDirectory(prefix="braces-eval-", ignore_cleanup_errors=True) as name:
        tasks = _load_tasks(selection, files, rows, Path(name), base, settings.limit)
        session = _open(model, adapters, options)
        texts = rows.get(perplexity.NAME, [])[: settings.limit] if selection.perplexity else []
        systems = [
            _measure(session, label, adapter, tasks, texts, settings, report)
            for label, adapter in _labels(adapters, settings.base)
        ]
    document = _document(session, systems, settings, files)
    document["settings"]["quantize"] = options.quantize
    return document


def _load_tasks(
    selection: catalog.Selection,
    files: dict[str, Path],
    rows: dict[str, list[Any]],
    folder: Path,
    base: str,
    limit: int | None,
) -> Any:
    if not selection.names:
        return None
    local = [name for name in files if name != perplexity.NAME]
    for name in local:
        write_override(selection.leaves[name], rows[name], folder)
    tasks = harness.load_tasks(selection, folder, {"pretrained": base})
    harness.check_documents(tasks, local, files, limit)
    return tasks


def _open(model: str | None, adapters: Sequence[str], options: LoadOptions) -> Session:
    """The bare base, after every adapter has been on it: one that does not fit must not cost an evaluation first."""
    if model is None and options.revision is None:
        own = read_config(adapter_folder(adapters[0])).revision if adapters else None
        options = replace(options, revision=own)
    session = open_session(base_name(model, adapters[0] if adapters else None), None, options)
    for name in adapters:
        adapter, _ = load_adapter(session.base.model, adapter_folder(name), session.base.fingerprint(session.ffns))
        adapter.detach()
    return session


def _labels(adapters: Sequence[str], base: bool) -> list[tuple[str, str | None]]:
    """(name of the system, adapter) of each; adapters go by their folder's name where that tells them apart."""
    short = [Path(name).name or name for name in adapters]
    labels: list[tuple[str, str | None]] = [("base", None)] if base else []
    for brief, name in zip(short, adapters, strict=True):
        label = brief if short.count(brief) == 1 and brief != "base" else name
        taken = {other for other, _ in labels}
        labels.append((label if label not in taken else f"{label} ({len(labels)})", name))
    return labels


def _measure(
    session: Session,
    label: str,
    adapter: str | None,
    tasks: Any,
    texts: Sequence[str],
    settings: EvalSettings,
    report: Report,
) -> System:
    if adapter is not None:
        session.add(adapter)
    model, tokenizer = session.base.model, session.base.tokenizer
    scores = harness.Scores()
    if tasks is not None:
        scores = harness.measure(
            model,
            tokenizer,
            tasks,
            batch_size=settings.batch_size,
            limit=settings.limit,
            num_fewshot=settings.num_fewshot,
            seeds=settings.seeds,
            stage=label,
            report=report,
        )
    units: dict[tuple[str, str], dict[int, float]] = {}
    if texts:
        size = settings.batch_size if isinstance(settings.batch_size, int) else max(scores.batch_sizes, default=_BATCH)
        found = perplexity.measure(
            model, tokenizer, texts, size, lambda _, done, total: report(f"{label}, perplexity", done, total)
        )
        scores.batch_sizes = sorted({*scores.batch_sizes, size})
        scores.results[perplexity.NAME] = found.results
        for metric, nats in found.nats.items():
            scores.documents[perplexity.NAME, metric] = nats
            units[perplexity.NAME, metric] = found.units[metric]
    return System(label, adapter, scores, units)


def _document(
    session: Session, systems: Sequence[System], settings: EvalSettings, files: dict[str, Path]
) -> dict[str, Any]:
    first = systems[0].scores
    unheeded = [task for task, shots in first.shots.items() if settings.num_fewshot not in (None, shots)]
    if unheeded:
        logger.warning("--num-fewshot is not heeded by %s, which fix their own number", ", ".join(unheeded))
    sizes = sorted({size for system in systems for size in system.scores.batch_sizes})
    model = session.base.model
    return {
        "systems": [
            {"name": each.name, "model": session.base.name, "adapter": each.adapter, "results": each.scores.results}
            for each in systems
        ],
        "comparisons": [row for other in systems[1:] for row in _compare(systems[0], other, settings.seeds["numpy"])],
        "settings": {
            "tasks": list(first.results),
            "task_data": {name: str(file) for name, file in files.items()},
            "batch_size": sizes[0] if len(sizes) == 1 else sizes,
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": str(model.device),
            "num_fewshot": settings.num_fewshot,
            "num_fewshot_used": first.shots,
            "limit": settings.limit,
            "seeds": settings.seeds,
            "versions": versions(),
        },
    }


def _compare(one: System, other: System, seed: int) -> list[dict[str, Any]]:
    rows = []
    for task, metrics in one.scores.results.items():
        for metric, entry in metrics.items():
            there = other.scores.results.get(task, {}).get(metric)
            if there is None:
                raise BracesError(f"{other.name} has no {metric}", where=task, hint="This is a fault of braces.")
            a, b = one.scores.documents.get((task, metric)), other.scores.documents.get((task, metric))
            p = p_value(a, b, one.units.get((task, metric)), seed) if a and b else None
            difference = there["value"] - entry["value"]
            rows.append(
                {
                    "task": task,
                    "metric": metric,
                    "from": one.name,
                    "to": other.name,
                    "difference": difference,
                    "p_value": p,
                }
            )
    return rows
