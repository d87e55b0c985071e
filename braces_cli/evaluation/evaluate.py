"""`braces eval` as one call: a base, its adapters and each of them steered, side by side, on the same documents."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from braces_cli.core.attributes.attribute import Attribute
from braces_cli.core.attributes.intervention import steered
from braces_cli.core.models.load_options import LoadOptions
from braces_cli.core.session import Session, base_name, open_session
from braces_cli.core.utils.distributed import Processes, join_with_accelerator, world_size
from braces_cli.core.utils.errors import ConfigError
from braces_cli.core.utils.progress import Report, silent
from braces_cli.core.utils.scratch_folder import scratch_folder
from braces_cli.evaluation import lm_eval_runner, task_catalog
from braces_cli.evaluation.adapter_switching import EvalAdapter, attached, check_fit, find_eval_adapter
from braces_cli.evaluation.attribute_tasks import DETECTION, check_detection
from braces_cli.evaluation.comparison import System
from braces_cli.evaluation.lm_eval_runner import HarnessSettings
from braces_cli.evaluation.native_tasks import TaskContext
from braces_cli.evaluation.result_document import document, identity
from braces_cli.evaluation.result_store import Store
from braces_cli.evaluation.scores import Scores, add_averages
from braces_cli.evaluation.settings import EvalSettings
from braces_cli.evaluation.system_plans import SystemPlan, check_systems, plan_systems
from braces_cli.evaluation.task_data_files import check_needed, find_files
from braces_cli.evaluation.task_loading import TaskUnit, check_documents, load_tasks
from braces_cli.evaluation.task_rows import check_fields, read_task_rows, write_override
from braces_cli.evaluation.thresholds import check_metrics, check_reached, check_tasks
from braces_cli.steering.chat_prompts import uses_chat_template

logger = logging.getLogger("braces")

# Sequences in a forward pass for native tasks, where lm-eval was left to choose its own.
_BATCH = 8


@dataclass(frozen=True)
class _Run:
    """All that measuring the systems takes; `documents` are those of the native tasks."""

    session: Session
    units: Sequence[TaskUnit]
    documents: dict[str, Sequence[Any]]
    settings: EvalSettings
    harness: HarnessSettings
    processes: Processes
    store: Store
    report: Report
    attributes: Sequence[Attribute] = ()


def run_evaluation(
    model: str | None,
    adapters: Sequence[str],
    options: LoadOptions,
    settings: EvalSettings,
    report: Report = silent,
    store: Store | None = None,
    resume: bool = False,
) -> dict[str, Any] | None:
    """Measure the base, then each adapter on it, unsteered and steered, and compare them document by document.

    Args:
        store: where each task's scores are kept when it is done.
        resume: go on from what `store` holds.

    Returns:
        `{systems, comparisons, settings}`, and `fail_under` where thresholds were given; None on
        every process but the first.

    Raises:
        ConfigError: see `check_settings`; nothing to evaluate; no model; an unknown attribute; a store of other
            settings.
        DataError: see `check_settings`; data that cannot be fetched.
        ModelError: the base or an adapter cannot be loaded, or an adapter or attribute does not fit.
    """
    store = Store() if store is None else store
    check_systems(adapters, settings)
    # Checks run from the cheapest to the most expensive: settings, files, adapters, tasks, weights.
    selection, files, rows = check_settings(settings)
    eval_adapters = [find_eval_adapter(name) for name in adapters]
    base, revision = _base(model, eval_adapters, options)
    processes, options = _join(replace(options, revision=revision))
    # Only the first process is sure to see the folder.
    run_identity = identity(base, eval_adapters, options, settings, selection, files)
    finished = processes.gather(store.begin(run_identity, resume) if processes.first else None)[0]
    if finished is not None:
        logger.info("%s: this run is finished already", store.folder)
        return _with_thresholds(finished, settings) if processes.first else None
    with scratch_folder() as folder:
        units = _units(selection, files, rows, folder, base, settings)
        session = open_session(base, None, options)
        harness = _harness_settings(settings, eval_adapters, session)
        check_fit(session, eval_adapters)
        plans = plan_systems(session, eval_adapters, settings)
        documents = {name: rows[name][: settings.limit] for name in selection.native}
        attributes = list({attribute.name: attribute for plan in plans for attribute, _ in plan.terms}.values())
        run = _Run(session, units, documents, settings, harness, processes, store, report, attributes)
        systems = [_measure(run, plan) for plan in plans]
        if not processes.first:
            return None
        for system in systems:
            add_averages(system.scores, selection.averaged)
    result = document(session, systems, settings, files, harness, options, selection)
    return _with_thresholds(result, settings)


def check_settings(settings: EvalSettings) -> tuple[task_catalog.Selection, dict[str, Path], dict[str, Sequence[Any]]]:
    """Resolve the tasks and read and check every local file; loads no model and fetches nothing.

    Returns:
        The selection, task -> file, and task -> its rows (documents, for native tasks).

    Raises:
        ConfigError: an unknown task, task data for none of them, no data where a task has none of its own, or no
            attribute where it needs one.
        DataError: a file that is missing, broken or lacks fields.
    """
    selection = task_catalog.select(settings.tasks)
    check_tasks(settings.thresholds, selection)
    if DETECTION.name in selection.native:
        check_detection(settings.attribute)
    files = find_files(selection, settings.task_data, settings.task_data_dir)
    check_needed(selection, files, task_catalog.LOCAL_ONLY)
    rows: dict[str, Sequence[Any]] = {}
    for name, file in files.items():
        if name in task_catalog.NATIVE_TASKS:
            rows[name] = task_catalog.NATIVE_TASKS[name].read(file)
        else:
            rows[name] = read_task_rows(file)
            check_fields(name, rows[name])
    return selection, files, rows


def _join(options: LoadOptions) -> tuple[Processes, LoadOptions]:
    """Join the other processes, and put the base on this process's own device.

    Raises:
        ConfigError: several processes and a base spread over several devices.
    """
    if world_size() == 1:
        return Processes(), options
    if options.device_map is not None:
        hint = "Start one process, or leave --device-map out."
        raise ConfigError("a base on several devices cannot be copied to each process", where="--device-map", hint=hint)
    import torch

    on_cpu = options.device == "cpu" or (options.device == "auto" and not torch.cuda.is_available())
    processes = join_with_accelerator(on_cpu)
    if not on_cpu and options.device in ("auto", "cuda"):
        options = replace(options, device=str(processes.accelerator.device))
    return processes, options


def _with_thresholds(result: dict[str, Any], settings: EvalSettings) -> dict[str, Any]:
    """The result with `fail_under`, which says whether the thresholds are reached."""
    # A finished run may hold the answer for other thresholds.
    result.pop("fail_under", None)
    return {**result, "fail_under": check_reached(settings.thresholds, result)} if settings.thresholds else result


def _base(model: str | None, adapters: Sequence[EvalAdapter], options: LoadOptions) -> tuple[str, str | None]:
    """Base and revision: those named, else the first adapter's own.

    Raises:
        ConfigError: none named, and the adapter names none.
    """
    if model is None and adapters:
        if adapters[0].base is None:
            raise ConfigError("the adapter does not name its base", where="--model", hint="Give a folder or hub id.")
        return adapters[0].base, options.revision or adapters[0].revision
    return base_name(model, None), options.revision


def _units(
    selection: task_catalog.Selection,
    files: dict[str, Path],
    rows: dict[str, Sequence[Any]],
    folder: Path,
    base: str,
    settings: EvalSettings,
) -> list[TaskUnit]:
    if not selection.names:
        return []
    local = [name for name in files if name not in task_catalog.NATIVE_TASKS]
    for name in local:
        write_override(selection.leaves[name], rows[name], folder)
    units = load_tasks(selection, folder, {"pretrained": base})
    check_documents(units, {name: files[name] for name in local}, settings.limit)
    check_metrics(settings.thresholds, units)
    return units


def _harness_settings(settings: EvalSettings, adapters: Sequence[EvalAdapter], session: Session) -> HarnessSettings:
    """How tasks are measured, the same for all systems.

    Raises:
        ConfigError: adapters trained with and without a chat template, or a tokenizer that has none.
    """
    template = settings.apply_chat_template
    if template is None:
        trained = {adapter.chat_template for adapter in adapters} - {None}
        if len(trained) > 1:
            what = "one adapter was trained with the chat template and another without"
            hint = "Choose one setting for all: --apply-chat-template or --no-apply-chat-template."
            raise ConfigError(what, where="--apply-chat-template", hint=hint)
        template = bool(trained and trained.pop())
    template = uses_chat_template(session, template)
    return HarnessSettings(settings.sequences, settings.limit, settings.num_fewshot, template, settings.seeds)


def _measure(run: _Run, plan: SystemPlan) -> System:
    """Measure what is not stored yet; on processes other than the first the scores are empty."""
    label, adapter = plan.label, plan.adapter
    names = [unit.name for unit in run.units] + list(run.documents)
    stored = {name: run.store.load(label, name) for name in names} if run.processes.first else {}
    done = set(run.processes.gather([name for name, scores in stored.items() if scores is not None])[0])
    fresh: dict[str, Scores] = {}
    if len(done) < len(names):
        with attached(run.session, adapter):
            for unit in run.units:
                if unit.name not in done:
                    _keep(run, fresh, label, unit.name, _measure_with_lm_eval(run, plan, unit))
            for name, documents in run.documents.items():
                if name not in done:
                    _keep(run, fresh, label, name, _measure_native(run, plan, name, documents))
    scores = Scores()
    for name in names:
        part = stored.get(name) or fresh.get(name)
        if part is not None:
            scores.add(part)
    if adapter is None:
        return System(label, None, scores, strengths=plan.strengths)
    return System(label, adapter.name, scores, adapter.method, adapter.sha256, plan.strengths)


def _keep(run: _Run, fresh: dict[str, Scores], label: str, name: str, scores: Scores | None) -> None:
    if scores is None or not run.processes.first:
        return
    run.store.save(label, name, scores)
    scores.samples = []
    fresh[name] = scores


def _measure_with_lm_eval(run: _Run, plan: SystemPlan, unit: TaskUnit) -> Scores | None:
    base, stage = run.session.base, f"{plan.label}, {unit.name}"
    with steered(run.session, plan.terms):
        return lm_eval_runner.measure(
            base.model, base.tokenizer, unit, run.harness, stage=stage, report=run.report, processes=run.processes
        )


def _measure_native(run: _Run, plan: SystemPlan, name: str, documents: Sequence[Any]) -> Scores:
    task, harness = task_catalog.NATIVE_TASKS[name], run.harness
    context = TaskContext(
        session=run.session,
        batch_size=harness.batch_size if isinstance(harness.batch_size, int) else _BATCH,
        chat_template=harness.chat_template,
        seed=harness.seeds["torch"],
        processes=run.processes,
        stage=f"{plan.label}, {name}",
        report=run.report,
        settings=run.settings,
        terms=plan.terms,
        attributes=run.attributes,
    )
    result = task.measure(context, documents)
    scores = Scores({name: result.results}, batch_sizes=[result.batch_size])
    scores.documents = {(name, metric): values for metric, values in result.documents.items()}
    scores.units = {(name, metric): values for metric, values in result.units.items()}
    scores.better = {(name, metric): better for metric, better in task.metrics.items()}
    for index, sample in result.samples.items():
        row = {metric: values[index] for metric, values in result.documents.items() if index in values}
        scores.samples.append({"task": name, "doc_id": index, **sample, "scores": row})
    return scores
