"""`braces eval` as one call: a base and its adapters, side by side, on the same documents."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from braces_cli.core.models.load_options import LoadOptions
from braces_cli.core.session import Session, base_name, open_session
from braces_cli.core.utils.errors import ConfigError
from braces_cli.core.utils.progress import Report, silent
from braces_cli.evaluation import lm_eval_runner, native_tasks, task_catalog
from braces_cli.evaluation.adapter_switching import EvalAdapter, attached, check_fit, find_eval_adapter
from braces_cli.evaluation.aggregation import add_averages, add_splits
from braces_cli.evaluation.comparison import System
from braces_cli.evaluation.lm_eval_runner import Way
from braces_cli.evaluation.native_task import Generation, Setting
from braces_cli.evaluation.processes import Processes, join
from braces_cli.evaluation.result_document import document, identity
from braces_cli.evaluation.result_store import Store
from braces_cli.evaluation.scores import Scores
from braces_cli.evaluation.settings import EvalSettings, check_settings
from braces_cli.evaluation.task_loading import Unit, check_documents, load_tasks
from braces_cli.evaluation.task_rows import write_override
from braces_cli.evaluation.thresholds import check_metrics, check_reached

__all__ = ["EvalSettings", "check_settings", "run_evaluation"]

logger = logging.getLogger("braces")

# Sequences a forward pass for our own tasks, where lm-eval was left to choose its own.
_BATCH = 8


@dataclass(frozen=True)
class _Job:
    """All that measuring one system takes."""

    session: Session
    units: Sequence[Unit]
    own_documents: dict[str, Sequence[Any]]
    way: Way
    processes: Processes
    store: Store
    report: Report
    generation: Generation


def run_evaluation(
    model: str | None,
    adapters: Sequence[str],
    options: LoadOptions,
    settings: EvalSettings,
    report: Report = silent,
    store: Store | None = None,
    resume: bool = False,
) -> dict[str, Any] | None:
    """Measure the base, then each adapter on it, and compare them document by document.

    Args:
        store: where each task's scores are kept when it is done.
        resume: go on from what `store` holds.

    Returns:
        `{systems, comparisons, settings}` as DESIGN 3.1 has it, and `fail_under` where thresholds were given; None on
        every process but the first.

    Raises:
        ConfigError: see `check_settings`; nothing to measure; no model; a store of other settings.
        DataError: see `check_settings`; data that cannot be fetched.
        ModelError: the base or an adapter cannot be loaded, or an adapter does not fit.
    """
    store = Store() if store is None else store
    if not settings.base and not adapters:
        raise ConfigError("nothing to measure", where="--no-base", hint="Give an --adapter, or leave --no-base out.")
    # What can be wrong is looked at from the cheapest to the dearest: settings, files, adapters, tasks, weights.
    selection, files, rows = check_settings(settings)
    found = [find_eval_adapter(name) for name in adapters]
    base, revision = _base(model, found, options)
    options = replace(options, revision=revision)
    processes, options = join(options)
    # Only the first process is sure to see the folder.
    asked = identity(base, found, options, settings, selection, files)
    finished = processes.gather(store.begin(asked, resume) if processes.first else None)[0]
    if finished is not None:
        logger.info("%s: this run is finished already", store.folder)
        return _judged(finished, settings) if processes.first else None
    with tempfile.TemporaryDirectory(prefix="braces-eval-", ignore_cleanup_errors=True) as name:
        units = _units(selection, files, rows, Path(name), base, settings)
        session = open_session(base, None, options)
        way = _way(settings, found, session)
        check_fit(session, found)
        documents = {name: rows[name][: settings.limit] for name in selection.own}
        job = _Job(session, units, documents, way, processes, store, report, settings.generation)
        systems = [_measure(job, label, adapter) for label, adapter in _labels(found, settings.base)]
        if not processes.first:
            return None
        for system in systems:
            add_averages(system.scores, selection)
            add_splits(system.scores, selection, units)
    return _judged(document(session, systems, settings, files, way, options, selection), settings)


def _judged(result: dict[str, Any], settings: EvalSettings) -> dict[str, Any]:
    # A finished run may have been judged by other thresholds.
    result.pop("fail_under", None)
    return {**result, "fail_under": check_reached(settings.thresholds, result)} if settings.thresholds else result


def _base(model: str | None, adapters: Sequence[EvalAdapter], options: LoadOptions) -> tuple[str, str | None]:
    """Base and revision: those named, else the first adapter's own.

    Raises:
        ConfigError: none named, and the adapter names none.
    """
    if model is None and adapters:
        if adapters[0].base is None:
            raise ConfigError("the adapter names no base", where="--model", hint="Give a folder or hub id.")
        return adapters[0].base, options.revision or adapters[0].revision
    return base_name(model, None), options.revision


def _units(
    selection: task_catalog.Selection,
    files: dict[str, Path],
    rows: dict[str, Sequence[Any]],
    folder: Path,
    base: str,
    settings: EvalSettings,
) -> list[Unit]:
    if not selection.names:
        return []
    local = [name for name in files if name not in native_tasks.TASKS]
    for name in local:
        write_override(selection.leaves[name], rows[name], folder)
    units = load_tasks(selection, folder, {"pretrained": base})
    check_documents(units, {name: files[name] for name in local}, settings.limit)
    check_metrics(settings.thresholds, units)
    return units


def _way(settings: EvalSettings, adapters: Sequence[EvalAdapter], session: Session) -> Way:
    """How tasks are measured, the same for all systems.

    Raises:
        ConfigError: adapters trained with and without a chat template, or a tokenizer that has none.
    """
    template = settings.chat_template
    if template is None:
        trained = {adapter.chat_template for adapter in adapters} - {None}
        if len(trained) > 1:
            what = "one adapter was trained with the chat template and another without"
            hint = "Say which all are asked with: --apply-chat-template or --no-apply-chat-template."
            raise ConfigError(what, where="--apply-chat-template", hint=hint)
        template = bool(trained and trained.pop())
    if template and not getattr(session.base.tokenizer, "chat_template", None):
        hint = "Leave --apply-chat-template out, or use an instruction-tuned base."
        raise ConfigError("the tokenizer has no chat template", where="--apply-chat-template", hint=hint)
    return Way(settings.batch_size, settings.limit, settings.num_fewshot, template, settings.seeds)


def _labels(adapters: Sequence[EvalAdapter], base: bool) -> list[tuple[str, EvalAdapter | None]]:
    """(name of the system, adapter) of each; adapters go by their folder's name where that tells them apart."""
    short = [Path(each.name).name or each.name for each in adapters]
    labels: list[tuple[str, EvalAdapter | None]] = [("base", None)] if base else []
    for brief, each in zip(short, adapters, strict=True):
        label = brief if short.count(brief) == 1 and brief != "base" else each.name
        taken = {other for other, _ in labels}
        labels.append((label if label not in taken else f"{label} ({len(labels)})", each))
    return labels


def _measure(job: _Job, label: str, adapter: EvalAdapter | None) -> System:
    """Measure what is not stored yet; on processes other than the first the scores are empty."""
    names = [unit.name for unit in job.units] + list(job.own_documents)
    stored = {name: job.store.load(label, name) for name in names} if job.processes.first else {}
    done = set(job.processes.gather([name for name, scores in stored.items() if scores is not None])[0])
    fresh: dict[str, Scores] = {}
    if len(done) < len(names):
        with attached(job.session, adapter):
            for unit in job.units:
                if unit.name not in done:
                    _keep(job, fresh, label, unit.name, _lm_eval(job, label, unit))
            for name, documents in job.own_documents.items():
                if name not in done:
                    _keep(job, fresh, label, name, _own(job, label, name, documents))
    scores = Scores()
    for name in names:
        part = stored.get(name) or fresh.get(name)
        if part is not None:
            scores.add(part)
    if adapter is None:
        return System(label, None, scores)
    return System(label, adapter.name, scores, adapter.method, adapter.sha256)


def _keep(job: _Job, fresh: dict[str, Scores], label: str, name: str, scores: Scores | None) -> None:
    if scores is None or not job.processes.first:
        return
    job.store.save(label, name, scores)
    scores.samples = []
    fresh[name] = scores


def _lm_eval(job: _Job, label: str, unit: Unit) -> Scores | None:
    base = job.session.base
    stage = f"{label}, {unit.name}"
    return lm_eval_runner.measure(
        base.model, base.tokenizer, unit, job.way, stage=stage, report=job.report, processes=job.processes
    )


def _own(job: _Job, label: str, name: str, documents: Sequence[Any]) -> Scores:
    size = job.way.batch_size if isinstance(job.way.batch_size, int) else _BATCH
    setting = Setting(
        job.session, size, job.way.seeds["torch"], job.processes, f"{label}, {name}", job.report, job.generation
    )
    found = native_tasks.TASKS[name].measure(setting, documents)
    scores = Scores({name: found.results}, batch_sizes=[found.batch_size])
    scores.documents = {(name, metric): values for metric, values in found.documents.items()}
    scores.units = {(name, metric): values for metric, values in found.units.items()}
    scores.better = {(name, metric): better for metric, better in native_tasks.TASKS[name].metrics.items()}
    for index, told in found.samples.items():
        row = {metric: values[index] for metric, values in found.documents.items() if index in values}
        scores.samples.append({"task": name, "doc_id": index, **told, "scores": row})
    return scores
