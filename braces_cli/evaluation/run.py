"""`braces eval` as one call: a base, its adapters and each of them steered, compared on the same documents."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from braces_cli.core.adapter.model import Session, open_session
from braces_cli.core.attributes.files import attribute_hashes
from braces_cli.core.attributes.hooks import steered
from braces_cli.core.attributes.lookup import find_attribute
from braces_cli.core.config import SETTINGS_FILE, options_of, write_settings
from braces_cli.core.distributed import join
from braces_cli.core.errors import ConfigError, DataError, logger, near_misses
from braces_cli.core.files import check_apart, file_hash, scratch_folder, value_hash, versions
from braces_cli.core.models.load import pick_device
from braces_cli.core.models.tokenize import context_length, has_template
from braces_cli.core.options import LoadOptions
from braces_cli.core.progress import Report, silent
from braces_cli.evaluation import catalog, lm_eval_runner
from braces_cli.evaluation.native_tasks import DETECTION, PERPLEXITY, Measure, TaskContext
from braces_cli.evaluation.results import AVERAGE, EMPTY, TRUNCATED, Store
from braces_cli.evaluation.settings import TEXT_TASKS, EvalSettings
from braces_cli.evaluation.statistics import LEVEL, compare, strength_slopes
from braces_cli.evaluation.systems import BRACES, EvalAdapter, System, attached, find_eval_adapter, labels, resolve_base
from braces_cli.evaluation.task_data import find_files, read_task_rows, write_override
from braces_cli.steering.texts import uses_chat_template


def run_evaluation(settings: EvalSettings, report: Report = silent) -> dict[str, Any] | None:
    """Measure the base and each adapter on it, unsteered and steered, and compare them document by document.

    Checks run from the cheapest to the most expensive: settings, files, adapters, tasks, weights. Scores of a task are
    stored in the output folder when it is done.

    Returns:
        `{systems, comparisons, settings}`, and `fail_under` if thresholds were given; None on every process but the
        first.
    """
    store = Store(settings.output_dir, log_samples=settings.log_samples)
    if settings.no_base and not settings.adapter and not settings.points:
        raise ConfigError("nothing to evaluate", where="--no-base", hint="Give an --adapter, or leave --no-base out.")
    selection, files, rows = check_settings(settings)
    adapters = [find_eval_adapter(name) for name in settings.adapter]
    model, revision = resolve_base(settings.model, settings.revision, adapters)
    if settings.output_dir is not None:
        check_apart(settings.output_dir, model, settings.attributes, *settings.adapter)
    device = pick_device(settings.device)
    processes = join(device, with_accelerator=True)
    settings = replace(settings, model=model, revision=revision, device=str(device))
    identity = _identity(settings, adapters, selection, files)
    if processes.first:
        store.begin(identity, settings.resume)
    with scratch_folder() as folder:
        for name in files.keys() & selection.leaves.keys():
            write_override(selection.leaves[name], rows[name], folder)
        units = lm_eval_runner.load_tasks(selection, folder, files, model, settings.limit)
        _check_thresholds(settings, selection, units)
        session = open_session(model, None, settings, template=_template(settings, adapters))
        if processes.first and settings.output_dir is not None:
            hashes = {name: value_hash(identity[name]) for name in ("adapters", "task_data")}
            write_settings(settings.output_dir / SETTINGS_FILE, settings, base=session.base.digest, **hashes)
        chat = _uses_chat_template(settings, adapters, session)
        lm_eval_runner.check_lengths(units, context_length(session.base.model.config, session.base.tokenizer))
        # The last adapter stays attached after its check, so it is measured first.
        with ExitStack() as stack:
            groups = _attach_and_plan(session, adapters, settings, stack)
            last = groups[-1]
            attributes = {each.name: each for group in groups for system in group for each, _ in system.terms}
            context = TaskContext(session, settings, chat, list(attributes.values()), processes, report)
            measures: dict[str, Measure] = {
                name: partial(lm_eval_runner.measure, context, unit) for name, unit in units.items()
            }
            for name in selection.native:
                measures[name] = catalog.NATIVE_TASKS[name].prepare(context, rows[name][: settings.limit])
            for group in reversed(groups):
                if group is not last:
                    stack.close()
                    stack.enter_context(attached(session, group[0].adapter))
                unsteered: dict[str, Any] = {}
                for system in group:
                    _measure(system, measures, context, store, unsteered)
    if not processes.first:
        return None
    systems = [system for group in groups for system in group]
    for system in systems:
        system.scores.add_averages(selection.averaged)
    _warn_of_answers(systems, chat, session)
    return _document(context, systems, files, identity)


def check_settings(settings: EvalSettings) -> tuple[catalog.Selection, dict[str, Path], dict[str, Sequence[Any]]]:
    """Resolve the tasks and read every local file; loads no model and fetches nothing.

    Returns:
        The selection, task -> file, and task -> its rows (documents of tasks of braces).
    """
    selection = catalog.select(settings.tasks)
    if DETECTION.name in selection.native and len(settings.attribute) != 1:
        what = f"detection needs one attribute, not {len(settings.attribute)}"
        hint = "Such as --attribute positive, with rows that are labelled `positive` and otherwise."
        raise ConfigError(what, where="--attribute", hint=hint)
    files = find_files(selection, settings.task_data, settings.task_data_dir)
    rows: dict[str, Sequence[Any]] = {}
    for name, file in files.items():
        native = catalog.NATIVE_TASKS.get(name)
        rows[name] = read_task_rows(name, file) if native is None else native.read(file)
    return selection, files, rows


def _template(settings: EvalSettings, adapters: Sequence[EvalAdapter]) -> str | None:
    """Return the chat template that the adapters were trained with, if it is not the base's; one for all systems."""
    stored = [adapter.stored.config.chat_template for adapter in adapters if adapter.stored is not None]
    if settings.template_text is None and any(each != stored[0] for each in stored):
        hint = "Give one for all: --chat-template FILE."
        raise ConfigError("the adapters were trained with different chat templates", where="--adapter", hint=hint)
    return stored[0] if stored else None


def _uses_chat_template(settings: EvalSettings, adapters: Sequence[EvalAdapter], session: Session) -> bool:
    """Return the setting, else how the adapters were trained; the same for all systems."""
    trained = {adapter.chat_template for adapter in adapters} - {None}
    if settings.uses_template is None and len(trained) > 1:
        what = "one adapter was trained with the chat template and another without"
        hint = "Choose one setting for all: --apply-chat-template or --no-apply-chat-template."
        raise ConfigError(what, where="--apply-chat-template", hint=hint)
    setting = settings.uses_template
    asks = {*",".join(settings.tasks).replace(" ", "").split(",")} - {PERPLEXITY.name, DETECTION.name}
    if asks and setting is None and not adapters and has_template(session.base.tokenizer):
        logger.warning("the chat template is not applied; a model that was tuned on chats needs --apply-chat-template")
    return uses_chat_template(session, True in trained if setting is None else setting)


# A share of answers above this gets a warning.
_MANY = 0.1


def _warn_of_answers(systems: Sequence[System], chat: bool, session: Session) -> None:
    """Warn of tasks with many answers that are empty, cut off or without a label."""
    examples = "show answers in the task's form: --num-fewshot 5"
    template = not chat and has_template(session.base.tokenizer)
    faults = {
        EMPTY: ("empty answers", "apply the chat template: --apply-chat-template" if template else examples),
        TRUNCATED: ("answers cut off", "ask for short answers: --system-prompt TEXT" if chat else examples),
        "answered": ("answers without a label", examples),
    }
    for task, metrics in systems[0].scores.results.items():
        for name in [name for name in faults if name in metrics]:
            shares = {each.name: each.scores.results[task][name].value for each in systems}
            found = {system: 1 - share if name == "answered" else share for system, share in shares.items()}
            if max(found.values()) > _MANY:
                listed = ", ".join(f"{system} {share:.0%}" for system, share in found.items())
                logger.warning("%s: %s: %s; to avoid them, %s", task, faults[name][0], listed, faults[name][1])


def _attach_and_plan(
    session: Session, adapters: Sequence[EvalAdapter], settings: EvalSettings, stack: ExitStack
) -> list[list[System]]:
    """Return the systems of the base and of each adapter, unsteered first; the last adapter stays attached.

    An adapter that does not fit, or an unknown attribute, must fail before anything is measured.
    """

    def group(label: str, adapter: EvalAdapter | None) -> list[System]:
        attributes = {name: find_attribute(session, name, settings.attributes) for name in settings.attribute}
        systems = [System(label, adapter)]
        for point in settings.points:
            name = f"{label}, {' '.join(f'{name} {s:+g}' for name, s in point.items())}"
            systems.append(System(name, adapter, [(attributes[name], s) for name, s in point.items()]))
        return systems

    groups = [[System("base")] if adapters else group("base", None)]
    if settings.no_base:
        groups[0].pop(0)
    for label, adapter in zip(labels(adapters), adapters, strict=True):
        stack.close()
        # A braces adapter can have attributes in its folder; under PEFT, built attributes would not be the base's.
        if adapter.method == BRACES:
            stack.enter_context(attached(session, adapter))
            groups.append(group(label, adapter))
        else:
            groups.append(group(label, adapter))
            stack.enter_context(attached(session, adapter))
    return [systems for systems in groups if systems]


def _measure(
    system: System, measures: dict[str, Measure], context: TaskContext, store: Store, unsteered: dict[str, Any]
) -> None:
    """Measure the tasks that are not stored; on processes other than the first the scores stay empty.

    Args:
        unsteered: measured `Scores` of the same adapter without steering, which are those at s = 0; added to.
    """
    processes = context.processes
    stored = {name: store.load(system.name, name) for name in measures} if processes.first else {}
    done = processes.gather([name for name, scores in stored.items() if scores is not None])[0]
    for name, measure in measures.items():
        scores = stored.get(name)
        if name not in done:
            at_zero = not any(system.strengths.values())
            if not at_zero or name not in unsteered:
                steering = steered(context.session, system.terms, scope=context.settings.scope)
                scores = measure(steering, f"{system.name}, {name}")
            scores = unsteered.setdefault(name, scores) if at_zero else scores
        if scores is not None and processes.first:
            if name not in done:
                store.save(system.name, name, scores)
            system.scores.add(scores)


def _identity(
    settings: EvalSettings, adapters: Sequence[EvalAdapter], selection: catalog.Selection, files: dict[str, Path]
) -> dict[str, Any]:
    """Return everything that the result depends on; a run is resumed only if it is equal."""
    names = [name for name in options_of(LoadOptions) if name not in ("device", "device_map")]
    names += ["model", "no_base", "limit", "num_fewshot", "apply_chat_template", "seeds"]
    identity = {name: getattr(settings, name) for name in names}
    identity["chat_template"] = [settings.template_text, settings.template_defaults]
    identity["adapters"] = [[each.name, each.sha256] for each in adapters]
    identity["tasks"] = [*selection.names, *selection.native]
    identity["task_data"] = {name: file_hash(file, DataError) for name, file in files.items()}
    if settings.attribute:
        folders = [settings.attributes, *(each.folder for each in adapters if each.stored is not None)]
        identity["steering"] = [settings.points, settings.scope]
        identity["attribute_files"] = attribute_hashes(settings.attribute, folders)
    if set(selection.native) & set(TEXT_TASKS):
        identity["generation"] = settings.generation_record()
    return identity


def _document(
    context: TaskContext, systems: Sequence[System], files: dict[str, Path], identity: dict[str, Any]
) -> dict[str, Any]:
    """Return `{systems, comparisons, settings}`, `slopes` if systems are steered, and `fail_under` with thresholds."""
    settings, base, first = context.settings, context.session.base, systems[0].scores
    fixed = [task for task, shots in first.shots.items() if settings.num_fewshot not in (None, shots)]
    if fixed:
        logger.warning("--num-fewshot has no effect on %s, which have a fixed number", ", ".join(fixed))
    sizes = sorted({size for system in systems for size in system.scores.batch_sizes})
    better = {
        task: {name: metric.better for name, metric in metrics.items() if metric.better is not None}
        for task, metrics in first.results.items()
    }
    rows = []
    for each in systems:
        about = {"name": each.name, "model": base.name, "adapter": None, "method": None, "sha256": None}
        if each.adapter is not None:
            about |= {"adapter": each.adapter.name, "method": each.adapter.method, "sha256": each.adapter.sha256}
        results = {
            task: {name: metric.entry() for name, metric in metrics.items()}
            for task, metrics in each.scores.results.items()
        }
        rows.append({**about, "attributes": each.strengths, "results": results})
    result: dict[str, Any] = {
        "systems": rows,
        "comparisons": compare(systems, settings.seeds["numpy"]),
        **({"slopes": strength_slopes(systems)} if settings.attribute else {}),
        "settings": {
            "tasks": list(first.results),
            "task_data": {name: str(file) for name, file in files.items()},
            "task_data_sha256": identity["task_data"],
            "task_versions": first.versions,
            "higher_is_better": {task: metrics for task, metrics in better.items() if metrics},
            "batch_size": sizes[0] if len(sizes) == 1 else sizes,
            "dtype": str(base.model.dtype).removeprefix("torch."),
            "device": str(base.model.device),
            **{name: getattr(settings, name) for name in ("quantize", "num_fewshot", "limit", "seeds")},
            "num_fewshot_used": first.shots,
            "revision": base.revision,
            "base_sha256": base.digest,
            "tokenizer": base.tokenizer_hashes,
            "apply_chat_template": context.chat,
            **(settings.steering_record() if settings.attribute else {}),
            **({"generation": identity["generation"]} if "generation" in identity else {}),
            "significance_level": LEVEL,
            "versions": versions(),
        },
    }
    return {**result, "fail_under": check_reached(settings.thresholds, result)} if settings.thresholds else result


def _check_thresholds(settings: EvalSettings, selection: catalog.Selection, units: dict[str, dict[str, Any]]) -> None:
    """Refuse thresholds of tasks that are not evaluated, and of metrics that their task does not have."""
    known: dict[str, list[str]] = {name: list(catalog.NATIVE_TASKS[name].metrics) for name in selection.native}
    known.update({name: [AVERAGE] for name in selection.averaged})
    for unit in units.values():
        for name, task in unit["tasks"].items():
            known[name] = [*task.aggregation(), *([EMPTY, TRUNCATED] if task.OUTPUT_TYPE == "generate_until" else [])]
    for task, metric, _ in settings.thresholds:
        if task not in known and task not in units:
            hint = near_misses(task, known) or f"Evaluated: {', '.join(known)}."
            raise ConfigError(f"`{task}` is not evaluated", where="--fail-under", hint=hint)
        if task in known and metric.partition(",")[0] not in known[task]:
            hint = near_misses(metric, known[task]) or f"It has {', '.join(known[task])}."
            raise ConfigError(f"{task} has no metric `{metric}`", where="--fail-under", hint=hint)


def check_reached(thresholds: Sequence[tuple[str, str, float]], result: dict[str, Any]) -> list[dict[str, Any]]:
    """Compare each adapter with each threshold, or the base (steered, if it is) without adapters.

    Returns:
        Rows `{task, metric, threshold, system, value, reached}`. If smaller is better (a perplexity), reached means at
        most the threshold. A missing value, or one that is not a number, reaches nothing.
    """
    systems = [
        system for system in result["systems"] if system["adapter"] is not None or system.get("attributes")
    ] or result["systems"]
    rows = []
    for task, metric, threshold in thresholds:
        more = result["settings"]["higher_is_better"].get(task, {}).get(metric, True)
        for system in systems:
            value = system["results"].get(task, {}).get(metric, {}).get("value")
            reached = value is not None and (value >= threshold if more else value <= threshold)
            about = {"task": task, "metric": metric, "threshold": threshold, "system": system["name"]}
            rows.append({**about, "value": value, "reached": reached})
    return rows
