"""Train an adapter and measure it: rows -> adapter folder and figures."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from braces_cli.core.adapter import files
from braces_cli.core.adapter import model as sessions
from braces_cli.core.adapter.layer import condition_shapes
from braces_cli.core.adapter.scale import measure_scales
from braces_cli.core.attributes.files import TRAINED_FILE
from braces_cli.core.attributes.vector import Attribute, save_attributes
from braces_cli.core.attributes.words import neutral_texts
from braces_cli.core.config import SETTINGS_FILE, flag_of, write_settings
from braces_cli.core.distributed import barrier, deferred, gathered, is_main, join, world_size
from braces_cli.core.errors import ConfigError, ModelError, logger
from braces_cli.core.files import check_apart, check_output_folder, output_lock, value_hash, versions
from braces_cli.core.models.ffn import FFN, MixtureFFN, choose_ffns, chosen_layers, find_ffns, parameter_total
from braces_cli.core.models.hub import check_push
from braces_cli.core.models.load import input_device, load_shape, load_tokenizer, pick_device
from braces_cli.core.models.tokenize import choose_template, context_length, encode, turn_ends
from braces_cli.core.progress import Report, silent
from braces_cli.data.dataset import Examples, Fields, Reading, Stream, log_counts, read_examples
from braces_cli.scoring.likelihood import Likelihood
from braces_cli.training.baselines import PeftAdapter, baseline_parameters
from braces_cli.training.batching import TrainingData, choose_layout, global_batch
from braces_cli.training.checkpoint import RUN_FILE, Record, checkpoints, finished, prepare_folder
from braces_cli.training.conditioning import Conditioner, gather_attributes, with_original_states
from braces_cli.training.loss import measure
from braces_cli.training.report import TrainResult, draw_curve, model_card, peak_memory
from braces_cli.training.settings import STRENGTH, TrainSettings


def train(settings: TrainSettings, report: Report = silent, command: Sequence[str] = ()) -> dict[str, Any]:
    """Train an adapter on the rows of `settings.data` and write it to `settings.output_dir`.

    With several processes each of them calls this, and the first one writes. With `settings.resume`, a finished run of
    the same settings is left unchanged.

    Args:
        command: words of the command line, for the record of the run.

    Returns:
        The fields of `TrainResult`.

    Raises:
        ConfigError: settings that do not fit the base, the launcher or the run in the folder.
        DataError: rows that cannot be read, or that name an unknown attribute.
        ModelError: the base, the adapter to continue from or a checkpoint cannot be loaded.
        BracesError: the loss is not finite, or the folder cannot be written.
        KeyboardInterrupt: stopped by a signal, after a checkpoint was written.
    """
    assert settings.output_dir is not None
    check_launch(settings.device)
    with output_lock(settings.output_dir):
        # With several processes only one checks: the first may be writing when another one checks.
        if is_main() or settings.resume:
            hint = "Give another one, or --overwrite."
            if checkpoints(settings.output_dir) or (settings.output_dir / RUN_FILE).is_file():
                hint = "--resume continues the run there; --overwrite starts anew and removes its checkpoints."
            check_output_folder(settings.output_dir, settings.overwrite or settings.resume, hint)
        if settings.push_to_hub is not None:
            check_push(settings.push_to_hub)
        record = Record(settings.identity(world_size()), list(command))
        result = finished(settings.output_dir, record.settings) if settings.resume else None
        return asdict(_train(settings, settings.output_dir, report, record) if result is None else result)


def _train(settings: TrainSettings, folder: Path, report: Report, record: Record) -> TrainResult:
    # Everything that can be checked without weights comes first, since loading them can take minutes.
    plan = resolve(settings)
    check_apart(folder, plan.base, settings.adapter)
    settings, reading = plan.settings, plan.reading
    train_set: Examples | Stream
    if settings.streaming:
        train_set = Stream(settings.data, reading, settings.seed, global_batch(settings))
    else:
        train_set = read_examples(settings.data, reading, report)
    eval_set = read_examples(settings.eval_data, plan.eval_reading, report) if settings.eval_data else None
    if settings.changes_template and not train_set.counts.chat:
        logger.warning("the options of the chat template have no effect: no row is a chat")
    session = sessions.open_session(plan.base, None, settings, reading.tokenizer)
    model, pad_id = session.base.model, session.base.tokenizer.pad_token_id
    join(input_device(model))
    attributes: list[Attribute] = []
    if settings.attribute_field is not None:
        sets = [train_set] if eval_set is None else [train_set, eval_set]
        attributes = gather_attributes(session, settings, sets, plan.start)
    record.data = {
        "data": train_set.counts.digest,
        "eval_data": None if eval_set is None else eval_set.counts.digest,
        "adapter": None if plan.start is None else files.adapter_hash(plan.start.folder),
        "model": None if session.base.is_quantised else value_hash(session.base.samples.tolist()),
    }
    checkpoint = prepare_folder(folder, settings.resume, record)
    if checkpoint is not None and attributes:
        attributes = with_original_states(attributes, checkpoint, session)
    layout = choose_layout(session, settings, train_set.items)

    def evaluate(conditioner: Conditioner | None, stage: str) -> Likelihood | None:
        if eval_set is None:
            return None
        # Windows of texts can be longer than --max-length: no more tokens in a batch than in training.
        longest = max(len(item.ids) for item in eval_set.items)
        size = max(1, min(settings.batch_size, settings.batch_size * settings.max_length // longest))
        return measure(model, eval_set, conditioner, pad_id, size, report, stage)

    if settings.method != "braces" and record.base is None:
        record.base = evaluate(None, "evaluating the base")  # before the adapter: PiSSA changes the base
    adapter = adapter_to_train(session, plan, checkpoint)
    conditioner = Conditioner(adapter, attributes) if isinstance(adapter, sessions.Adapter) and attributes else None
    config = _config(session, plan, adapter, attributes, train_set.counts.chat)
    write = partial(_write, adapter, config, attributes)
    data = TrainingData(train_set, layout, conditioner, pad_id)
    evaluate_now = partial(evaluate, conditioner, "evaluating")
    figures = _fit(adapter, settings, data, record, write, evaluate_now, report, checkpoint)
    tuned = evaluate(conditioner, "evaluating the adapter")
    if isinstance(adapter, sessions.Adapter) and record.base is None:
        with adapter.disabled():
            record.base = evaluate(None, "evaluating the base")
    likelihoods: dict[str, Any] = {
        f"{prefix}_{name}": getattr(measured, name, None)
        for prefix, measured in (("base_eval", record.base), ("eval", tuned))
        for name in ("loss", "perplexity")
    }
    result = TrainResult(
        output_dir=str(folder),
        method=settings.method,
        packed=layout.packed,
        resumed_from=None if checkpoint is None else str(checkpoint),
        rows=train_set.counts.rows,
        rows_truncated=train_set.counts.truncated,
        rows_dropped=train_set.counts.dropped,
        **plan.counts,
        **figures,
        **likelihoods,
    )
    tensors = adapter.tensors(in_place=world_size() == 1)
    if is_main():
        named = replace(settings, model=session.base.name, revision=session.base.revision)
        write_settings(folder / SETTINGS_FILE, named, settings.unused(), **record.data)
        drawn = draw_curve(folder, {0: result.base_eval_loss, result.steps: result.eval_loss})
        write(model_card(config, asdict(result), record.settings, record.command, drawn), tensors, folder)
        # Last of all: a record with a result marks a finished run.
        replace(record, result=result).write(folder)
    barrier()
    return result


def _config(
    session: sessions.Session,
    plan: Plan,
    adapter: sessions.Adapter | PeftAdapter,
    attributes: Sequence[Attribute],
    chat: bool,
) -> files.AdapterConfig:
    base, settings = session.base, plan.settings
    layers = None if settings.layers is None else adapter.layers
    return files.AdapterConfig(
        base_model_name_or_path=base.name,
        revision=base.revision,
        r=adapter.rank,
        layers=adapter.layers,
        base=base.sizes,
        tokenizer=base.tokenizer_hashes,
        training={**settings.recorded(), "layers": layers, "chat_template": chat},
        attributes=[attribute.name for attribute in attributes],
        versions=versions(),
        method=adapter.method if isinstance(adapter, PeftAdapter) else settings.method,
        relevance_to=settings.relevance_to,
        relevance_scale=list(adapter.scales),
        chat_template=plan.template,
        end_of_turn=turn_ends(base.tokenizer) if chat else [],
    )


def _write(
    adapter: sessions.Adapter | PeftAdapter,
    config: files.AdapterConfig,
    attributes: Sequence[Attribute],
    card: str,
    tensors: dict[str, Any],
    folder: Path,
) -> None:
    """Write an adapter folder, the config last."""
    if isinstance(adapter, PeftAdapter):
        adapter.save(folder, config, card)
        return
    if attributes:
        save_attributes(folder / TRAINED_FILE, attributes)
    files.write_adapter(folder, tensors, config, card)


def _fit(
    adapter: sessions.Adapter | PeftAdapter,
    settings: TrainSettings,
    data: TrainingData,
    record: Record,
    write: Callable[[str, dict[str, Any], Path], None],
    evaluate: Callable[[], Likelihood | None],
    report: Report,
    checkpoint: Path | None,
) -> dict[str, Any]:
    """Train; afterwards the model holds the adapter as it will be saved. Return the figures of the steps."""
    from braces_cli.training.loop import Trainer  # here, so that a refused run does not import accelerate

    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    with deferred() as stop:
        trainer = Trainer(adapter, settings, data, record, write, evaluate, report, stop)
        trainer.run(checkpoint)
    if trainer.stopped_by:
        logger.info("stopped after step %d; continue with --resume", trainer.step)
        signal.raise_signal(signal.Signals(trainer.stopped_by))
    memory = torch.cuda.max_memory_allocated() if cuda else peak_memory()
    progress = trainer.progress()
    if not trainer.is_fsdp:
        # Replace the projections by those that the file holds, so that the saved adapter is evaluated.
        adapter.tensors()
    if isinstance(data.examples, Stream):
        log_counts(data.examples.counts, settings.max_length)
    return {
        "steps": trainer.step,
        # The length of a pass over a stream is unknown.
        "epochs": None if isinstance(data.examples, Stream) else trainer.epoch,
        "train_loss": (progress.loss_sum + progress.loss_open) / max(trainer.step, 1),
        "seconds": progress.seconds,
        "tokens": progress.tokens,
        "tokens_per_second": progress.tokens / progress.seconds,
        "peak_memory": int(memory),
        "padding_share": 1 - progress.tokens / max(progress.computed, 1),
    }


@dataclass(frozen=True)
class Plan:
    """A run with all settings resolved, before rows and weights are read.

    Attributes:
        settings: including base, rank and layers of `start`, the learning rate and the maximum length for the base.
        base: name of the base model.
        start: adapter to continue from.
        layers: decoder layers to adapt; None is all.
        counts: `{trainable_parameters, condition_parameters, total_parameters, trainable_percent}`.
        reading: tokenizer of the base, and how rows become examples.
        eval_reading: the same for the evaluation rows; texts are measured as by the task `perplexity`.
        template: chat template, if it is not that of the base.
    """

    settings: TrainSettings
    base: str
    start: files.StoredAdapter | None
    layers: list[int] | None
    counts: dict[str, Any]
    reading: Reading
    eval_reading: Reading
    template: str | None


def resolve(settings: TrainSettings) -> Plan:
    """Complete the settings from the base without weights, its tokenizer and the adapter to continue from.

    Raises:
        ConfigError: rank, layers or targets that do not fit the base, or differ from those of the adapter.
        ModelError: base or adapter cannot be read, or do not fit.
    """
    start, inherited = None, {}
    model, revision = settings.model, settings.revision
    if settings.adapter is not None:
        start = files.find_adapter(settings.adapter)
        config = start.config
        _check_continued(settings, config)
        if model is None:
            model, revision = sessions.base_name(None, start), revision or config.revision
        inherited = {"model": model, "revision": revision, **_fixed(config)}
    base, code = sessions.base_name(model, None), settings.trust_remote_code
    shape = load_shape(base, revision=revision, trust_remote_code=code)
    tokenizer = load_tokenizer(base, revision=revision, trust_remote_code=code)
    ffns = find_ffns(shape)
    settings = settings.resolve(ffns[0].hidden_size, context_length(shape.config, tokenizer), **inherited)
    try:
        layers = chosen_layers(shape, settings.layers)
        counts = count_parameters(shape, ffns, settings, layers)
    except ConfigError as error:
        if start is None:
            raise
        what = f"it does not fit the base: {error.message}"
        raise ModelError(what, where=start.name, hint="Was it trained on this base?") from error
    attribute, strength = settings.attribute_field, settings.strength_field
    named = strength != STRENGTH or settings.given.get("strength_field") == "command line"
    fields = None if attribute is None else Fields(attribute, strength, named)
    reading = Reading(tokenizer, settings.max_length, fields, settings.row_columns, settings.streaming)
    template = choose_template(tokenizer, settings, None if start is None else start.config.chat_template)
    eval_reading = replace(reading, window=context_length(shape.config, tokenizer))
    return Plan(settings, base, start, layers, counts, reading, eval_reading, template)


def _fixed(config: files.AdapterConfig) -> dict[str, Any]:
    """Settings of an adapter that continued training cannot change."""
    layers = ",".join(map(str, config.layers))
    return {"rank": config.r, "layers": layers, "relevance_to": config.relevance_to}


def _check_continued(settings: TrainSettings, config: files.AdapterConfig) -> None:
    """Compare the settings with those of the adapter to continue from.

    Raises:
        ConfigError: another rank, layers or relevance, or an adapter with attributes in a run without.
    """
    for name, stored in _fixed(config).items():
        if name in settings.given and getattr(settings, name) != stored:
            flag = flag_of(TrainSettings, name)
            hint = f"Leave out {flag}, or train a new adapter without --adapter."
            raise ConfigError(f"the adapter has {flag[2:]} {stored}", where=flag, hint=hint)
    if settings.scale is not None and set(config.relevance_scale) != {settings.scale}:
        hint = "Leave out --relevance-scale, or train a new adapter without --adapter."
        raise ConfigError("the adapter has another relevance scale", where="--relevance-scale", hint=hint)
    if config.attributes and settings.attribute_field is None:
        hint = "Name the column of each row's attribute with --attribute-field."
        raise ConfigError("the adapter was trained with attributes", where="--adapter", hint=hint)


def count_parameters(
    model: Any, ffns: Sequence[FFN | MixtureFFN], settings: TrainSettings, layers: Sequence[int] | None = None
) -> dict[str, Any]:
    """`{trainable_parameters, condition_parameters, total_parameters, trainable_percent}` from the sizes of a model.

    Raises:
        ConfigError: rank, layers or targets that do not fit.
    """
    total, condition = parameter_total(model), 0
    if settings.method != "braces":
        trainable = baseline_parameters(model, settings, layers)
    else:
        chosen = choose_ffns(ffns, settings.rank, layers)
        trainable = sum(files.parameter_count(settings.rank, ffn.hidden_size, settings.relevance_to) for ffn in chosen)
        if settings.attribute_field is not None:
            condition = sum(math.prod(shape) for shape in condition_shapes(chosen[0].hidden_size).values())
    return {
        "trainable_parameters": trainable,
        "condition_parameters": condition,
        "total_parameters": total,
        "trainable_percent": 100 * trainable / total,
    }


def adapter_to_train(session: sessions.Session, plan: Plan, checkpoint: Path | None) -> sessions.Adapter | PeftAdapter:
    """Attach a fresh adapter, or the one to continue from.

    Args:
        checkpoint: of the run that is resumed; it holds the relevance scales.

    Raises:
        ConfigError: peft refuses the config.
        ModelError: the adapter to continue from is damaged, or belongs to another base.
    """
    model, settings = session.base.model, plan.settings
    if plan.start is not None:
        adapter = sessions.attach_stored(session.base, plan.start)
        adapter.freeze_base()
        for module in (*(module for _, module in adapter.adapted_ffns), adapter.mlp):
            if module is not None:
                module.requires_grad_(True)
    elif settings.method != "braces":
        return PeftAdapter(model, settings, plan.layers)
    else:
        ffns = [ffn for ffn in session.ffns if plan.layers is None or ffn.layer in plan.layers]
        if checkpoint is not None:
            resumed = files.find_adapter(str(checkpoint))
            sessions.check_base(resumed, session.base)
            scales = resumed.config.relevance_scale
        elif settings.scale is not None:
            scales = [settings.scale] * len(ffns)
        else:
            texts = [encode(session.base.tokenizer, text).ids for text in neutral_texts()]
            # In half precision the numbers can differ between devices, but all processes must train the same adapter.
            scales = gathered(measure_scales(model, ffns, texts, settings.relevance_to))[0]
        relevance_to = settings.relevance_to
        adapter = sessions.attach(model, settings.rank, plan.layers, settings.seed, scales, session.ffns, relevance_to)
    if settings.attribute_field is not None and adapter.mlp is None:
        adapter.add_mlp(settings.seed)
    return adapter


_DDP = "Use recipes/launch/ddp.yaml, or torchrun."
_FSDP2 = "Start from recipes/launch/fsdp2.yaml."
# Settings of `accelerate launch` that adapters cannot be trained under.
_UNSUPPORTED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "parallelism_config",
}


def check_launch(device: str) -> None:
    """Check the environment of `accelerate launch` before anything is loaded.

    Args:
        device: value of `--device`.

    Raises:
        ConfigError: FSDP on a CPU or with unsupported settings; DeepSpeed; tensor, context or pipeline parallelism.
    """
    on = {name for name, value in os.environ.items() if value.lower() == "true"}
    for name, what in _UNSUPPORTED.items():
        if name in on:
            raise ConfigError("an adapter is trained under DDP or FSDP2 only", where=what, hint=_DDP)
    if "ACCELERATE_USE_FSDP" not in on:
        return
    faults = {
        "fsdp_version": (
            os.environ.get("FSDP_VERSION", "1") != "2",
            "only version 2 separates the adapter's parameters from those of the base", _FSDP2,
        ),
        "fsdp_cpu_ram_efficient_loading: true": (
            "FSDP_CPU_RAM_EFFICIENT_LOADING" in on,
            "every process runs the base before it is sharded, so each must load it", _FSDP2,
        ),
        "fsdp_activation_checkpointing: true": (
            "FSDP_ACTIVATION_CHECKPOINTING" in on,
            "it changes the names of parameters", "Set it to false, and give --gradient-checkpointing.",
        ),
    }  # fmt: skip
    for where, (is_fault, what, hint) in faults.items():
        if is_fault:
            raise ConfigError(what, where=where, hint=hint)
    if pick_device(device).type == "cpu":
        raise ConfigError("accelerate has no FSDP on a CPU: the base would not be sharded", where="FSDP", hint=_DDP)
