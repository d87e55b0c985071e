"""`--fail-under TASK:METRIC=VALUE`: a result that must be reached.

The JSON document of an evaluation, and the settings that identify a run.

`braces eval` as one call: a base, its adapters and each of them steered, side by side, on the same documents.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from braces_cli.core.adapter.model import Session, base_name, open_session
from braces_cli.core.attributes.files import attribute_hashes
from braces_cli.core.attributes.hooks import steered
from braces_cli.core.attributes.vector import Attribute
from braces_cli.core.config import options_of
from braces_cli.core.distributed import Processes, join_with_accelerator, world_size
from braces_cli.core.errors import ConfigError, DataError, near_misses
from braces_cli.core.files import file_hash, scratch_folder
from braces_cli.core.models.load import tokenizer_hashes
from braces_cli.core.options import LoadOptions
from braces_cli.core.progress import Report, silent
from braces_cli.core.versions import versions
from braces_cli.evaluation import catalog, lm_eval_runner
from braces_cli.evaluation.catalog import Selection, check_needed, find_files
from braces_cli.evaluation.lm_eval_runner import HarnessSettings, TaskUnit, check_documents, load_tasks
from braces_cli.evaluation.native_tasks import DETECTION, TaskContext, check_detection
from braces_cli.evaluation.results import AVERAGE, Scores, Store, add_averages
from braces_cli.evaluation.settings import TEXT_TASKS, EvalSettings, Threshold
from braces_cli.evaluation.statistics import LEVEL, System, compare, strength_slopes
from braces_cli.evaluation.systems import (
    EvalAdapter,
    SystemPlan,
    attached,
    check_fit,
    check_systems,
    find_eval_adapter,
    plan_systems,
)
from braces_cli.evaluation.task_data import check_fields, read_task_rows, write_override
from braces_cli.steering.texts import uses_chat_template

logger = logging.getLogger("braces")


def check_tasks(thresholds: Sequence[Threshold], selection: catalog.Selection) -> None:
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
    known: dict[str, list[str]] = {name: list(task.metrics) for name, task in catalog.NATIVE_TASKS.items()}
    known.update({name: [AVERAGE] for name in catalog.AVERAGED})
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


def identity(
    base: str,
    adapters: Sequence[EvalAdapter],
    options: LoadOptions,
    settings: EvalSettings,
    selection: Selection,
    files: dict[str, Path],
) -> dict[str, Any]:
    """All that scores depend on but for rounding; device and batch size may change when a run is resumed."""
    return {
        "model": base,
        "adapters": [[each.name, each.sha256] for each in adapters],
        "load": {
            name: getattr(options, name) for name in options_of(LoadOptions) if name not in ("device", "device_map")
        },
        "base": not settings.no_base,
        "tasks": [*selection.names, *selection.native],
        "groups": sorted(selection.groups),
        "task_data": {name: file_hash(file, DataError) for name, file in files.items()},
        "limit": settings.limit,
        "num_fewshot": settings.num_fewshot,
        "chat_template": settings.apply_chat_template,
        "seeds": settings.seeds,
        **_steering(adapters, settings),
        **_generation(settings, selection),
    }


def _steering(adapters: Sequence[EvalAdapter], settings: EvalSettings) -> dict[str, Any]:
    """Attributes and strengths, with a hash of each file that one may come from; nothing where there is none."""
    if not settings.attribute:
        return {}
    folders = [settings.attributes, *(each.folder for each in adapters if each.stored is not None)]
    hashes = attribute_hashes(settings.attribute, folders)
    return {"steering": settings.points, "attribute_files": hashes}


def _generation(settings: EvalSettings, selection: Selection) -> dict[str, Any]:
    """How texts were generated, where a task generates any."""
    return {"generation": settings.generation_record()} if set(selection.native) & set(TEXT_TASKS) else {}


def document(
    session: Session,
    systems: Sequence[System],
    settings: EvalSettings,
    files: dict[str, Path],
    harness: HarnessSettings,
    options: LoadOptions,
    selection: Selection,
) -> dict[str, Any]:
    """`{systems, comparisons, settings}`, and `slopes` where systems are steered."""
    first = systems[0].scores
    fixed = [task for task, shots in first.shots.items() if settings.num_fewshot not in (None, shots)]
    if fixed:
        logger.warning("--num-fewshot has no effect on %s, which fix their own number", ", ".join(fixed))
    sizes = sorted({size for system in systems for size in system.scores.batch_sizes})
    base = session.base
    better: dict[str, dict[str, bool]] = {}
    for (task, metric), more in first.better.items():
        better.setdefault(task, {})[metric] = more
    return {
        "systems": [
            {
                "name": each.name,
                "model": base.name,
                "adapter": each.adapter,
                "method": each.method,
                "sha256": each.sha256,
                "attributes": each.strengths,
                "results": each.scores.results,
            }
            for each in systems
        ],
        "comparisons": compare(systems, settings.seeds["numpy"]),
        **({"slopes": strength_slopes(systems)} if settings.attribute else {}),
        "settings": {
            "tasks": list(first.results),
            "task_data": {name: str(file) for name, file in files.items()},
            "task_data_sha256": {name: file_hash(file, DataError) for name, file in files.items()},
            "task_versions": first.versions,
            "higher_is_better": better,
            "batch_size": sizes[0] if len(sizes) == 1 else sizes,
            "dtype": str(base.model.dtype).removeprefix("torch."),
            "device": str(base.model.device),
            "quantize": options.quantize,
            "num_fewshot": settings.num_fewshot,
            "num_fewshot_used": first.shots,
            "limit": settings.limit,
            "seeds": settings.seeds,
            "revision": base.revision,
            "fingerprint": base.fingerprint(session.ffns)["sha256"],
            "tokenizer": tokenizer_hashes(base.tokenizer),
            "apply_chat_template": harness.chat_template,
            **(settings.steering_record() if settings.attribute else {}),
            **_generation(settings, selection),
            "significance_level": LEVEL,
            "versions": versions(),
        },
    }


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


def check_settings(settings: EvalSettings) -> tuple[catalog.Selection, dict[str, Path], dict[str, Sequence[Any]]]:
    """Resolve the tasks and read and check every local file; loads no model and fetches nothing.

    Returns:
        The selection, task -> file, and task -> its rows (documents, for native tasks).

    Raises:
        ConfigError: an unknown task, task data for none of them, no data where a task has none of its own, or no
            attribute where it needs one.
        DataError: a file that is missing, broken or lacks fields.
    """
    selection = catalog.select(settings.tasks)
    check_tasks(settings.thresholds, selection)
    if DETECTION.name in selection.native:
        check_detection(settings.attribute)
    files = find_files(selection, settings.task_data, settings.task_data_dir)
    check_needed(selection, files, catalog.LOCAL_ONLY)
    rows: dict[str, Sequence[Any]] = {}
    for name, file in files.items():
        if name in catalog.NATIVE_TASKS:
            rows[name] = catalog.NATIVE_TASKS[name].read(file)
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
    selection: catalog.Selection,
    files: dict[str, Path],
    rows: dict[str, Sequence[Any]],
    folder: Path,
    base: str,
    settings: EvalSettings,
) -> list[TaskUnit]:
    if not selection.names:
        return []
    local = [name for name in files if name not in catalog.NATIVE_TASKS]
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
    task, harness = catalog.NATIVE_TASKS[name], run.harness
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
