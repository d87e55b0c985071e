"""Train an adapter and measure it: rows -> adapter folder and figures."""

from __future__ import annotations

import logging
import math
import resource
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch

from braces_cli.core.adapter.files import AdapterConfig, StoredAdapter, write_adapter
from braces_cli.core.adapter.layer import condition_shapes
from braces_cli.core.adapter.model import Adapter, Session, attach, base_name, open_session
from braces_cli.core.attributes.files import TRAINED_FILE
from braces_cli.core.attributes.vector import Attribute, save_attributes
from braces_cli.core.distributed import barrier, deferred, is_main, join, world_size
from braces_cli.core.files import output_lock, versions
from braces_cli.core.models.ffn import find_ffns, parameter_total
from braces_cli.core.models.hub import check_push
from braces_cli.core.models.load import input_device, load_shape, load_tokenizer
from braces_cli.core.models.tokenize import context_length
from braces_cli.core.progress import Report, Timings, silent
from braces_cli.data.dataset import Examples, Fields, Reading, Stream, log_counts, read_examples
from braces_cli.scoring.likelihood import Likelihood
from braces_cli.training.baselines import PeftAdapter, baseline_parameters
from braces_cli.training.batching import TrainingData, choose_layout, global_batch
from braces_cli.training.conditioning import Conditioner, gather_attributes, with_original_states
from braces_cli.training.loss import measure
from braces_cli.training.record import (
    BaseLikelihood,
    Record,
    TrainResult,
    check_run_folder,
    digest,
    finished,
    prepare_folder,
)
from braces_cli.training.report import CHECKPOINT_CARD, draw_curve, model_card
from braces_cli.training.settings import STRENGTH, TrainSettings
from braces_cli.training.setup import adapted_layers, adapter_to_train, check_launch, shares, starting_point

logger = logging.getLogger("braces")

_COUNTS = ("trainable_parameters", "condition_parameters", "total_parameters", "trainable_percent")


def train(settings: TrainSettings, report: Report = silent, command: Sequence[str] = ()) -> dict[str, Any]:
    """Train an adapter on the rows of `settings.data` and write it to `settings.output_dir`.

    A finished run with the same settings is left as it is where `settings.resume` is on.

    Args:
        command: the words that started the run, for its record.

    Returns the fields of `TrainResult`.

    Raises:
        ConfigError: settings that do not fit the base, the launcher or the run in the folder.
        DataError: rows that cannot be read.
        ModelError: the base or a checkpoint cannot be loaded.
        BracesError: see `run_training`.
    """
    assert settings.output_dir is not None
    check_launch(settings.device)
    with output_lock(settings.output_dir):
        return _train(settings, settings.output_dir, report, command)


def _train(settings: TrainSettings, folder: Path, report: Report, command: Sequence[str]) -> dict[str, Any]:
    """`train` into a folder that no other command writes to."""
    identity = settings.identity(world_size())
    # One process looks: by the time that another one does, the first may be writing.
    if is_main() or settings.resume:
        check_run_folder(folder, overwrite=settings.overwrite, resume=settings.resume)
    if settings.push_to_hub is not None:
        check_push(settings.push_to_hub)
    result = finished(folder, identity) if settings.resume else None
    if result is not None:
        return result
    # What can be wrong is checked before minutes of loading weights: rank and layers on the bare shape, then rows.
    timings = Timings()
    with timings.stage("model without weights and tokenizer"):
        settings, start, shape, reading = prepare(settings)
        count_parameters(shape, settings)
    train_set: Examples | Stream
    with timings.stage("reading and tokenising"):
        if settings.streaming:
            train_set = Stream(settings.data, reading, settings.seed, global_batch(settings))
        else:
            train_set = read_examples(settings.data, reading, report)
        eval_set = read_examples(settings.eval_data, reading, report) if settings.eval_data else None
    with timings.stage("weights"):
        session = open_session(base_name(settings.model, None), None, settings)
    record = Record(identity, list(command))
    return asdict(run_training(session, train_set, eval_set, settings, report, record, start, timings))


def prepare(settings: TrainSettings) -> tuple[TrainSettings, StoredAdapter | None, Any, Reading]:
    """Resolved settings, the adapter to continue from, the base without weights, and how rows become examples."""
    start = starting_point(settings)
    model, revision = settings.base(start and start.config)
    name, code = base_name(model, None), settings.trust_remote_code
    shape = load_shape(name, revision=revision, trust_remote_code=code)
    tokenizer = load_tokenizer(name, revision=revision, trust_remote_code=code)
    width, context = find_ffns(shape)[0].hidden_size, context_length(shape.config, tokenizer)
    resolved = settings.resolve(width, context, start and start.config)
    attribute, strength = resolved.attribute_field, resolved.strength_field
    named = strength != STRENGTH or resolved.given.get("strength_field") == "command line"
    fields = None if attribute is None else Fields(attribute, strength, named)
    return (
        resolved,
        start,
        shape,
        Reading(tokenizer, resolved.max_length, fields, resolved.row_columns, resolved.streaming),
    )


def count_parameters(model: Any, settings: TrainSettings) -> dict[str, Any]:
    """`{trainable_parameters, condition_parameters, total_parameters, trainable_percent}`, on any device, meta too."""
    total = parameter_total(model)
    if settings.method != "braces":
        trainable = baseline_parameters(model, settings)
        share = 100 * trainable / total
        return dict(zip(_COUNTS, (trainable, 0, total, share), strict=True))
    layers = adapted_layers(model, settings)
    adapter = attach(model, settings.rank, layers)
    trainable = adapter.parameter_count()
    width = adapter.adapted_ffns[0][0].hidden_size
    adapter.detach()
    condition = sum(math.prod(shape) for shape in condition_shapes(width).values())
    condition = condition if settings.attribute_field is not None else 0
    return dict(zip(_COUNTS, (trainable, condition, total, 100 * trainable / total), strict=True))


def run_training(
    session: Session,
    train_set: Examples | Stream,
    eval_set: Examples | None,
    settings: TrainSettings,
    report: Report = silent,
    record: Record | None = None,
    start: StoredAdapter | None = None,
    timings: Timings | None = None,
) -> TrainResult:
    """Fine-tune an adapter on an open base and write it to `settings.output_dir`.

    In the end the adapter is measured on `eval_set` as it was saved, each row conditioned on its own attribute where
    attributes are trained, and the base with the adapter switched off. With several processes each of them calls this,
    and the first one writes.

    Args:
        record: what the run is known by when it is resumed.
        start: adapter to continue from.
        timings: of what was done so far; the table is logged before the first step.

    Raises:
        DataError: a row names an unknown attribute.
        ConfigError: rank or layers that do not fit the base, or a checkpoint of other data.
        ModelError: a checkpoint that cannot be read.
        BracesError: the loss is not finite, or the folder cannot be written.
        KeyboardInterrupt: a signal asked to stop, and a checkpoint was written.
    """
    assert settings.output_dir is not None
    model, pad_id = session.base.model, session.base.tokenizer.pad_token_id
    folder = settings.output_dir
    join(input_device(model))
    counts, timings, record = count_parameters(model, settings), timings or Timings(), record or Record()
    with timings.stage("attributes"):
        attributes = _attributes(session, settings, [train_set, eval_set], start)
    with timings.stage("hash of the rows"):
        record.data = digest(train_set)
    checkpoint = prepare_folder(folder, settings.resume, record)
    attributes = with_original_states(attributes, checkpoint, session)
    run = _Run(session, settings, folder, report, attributes, record, timings, train_set.chat)

    def evaluate(conditioner: Conditioner | None, stage: str) -> Likelihood | None:
        return measure(model, eval_set, conditioner, pad_id, settings.batch_size, report, stage)

    with timings.stage("probes of packing and logits"):
        layout = choose_layout(session, settings, train_set.items)
    if settings.method != "braces":
        # PiSSA changes the base.
        with timings.stage("evaluating the base"):
            _measure_base(run.record, evaluate)
    with timings.stage("attaching the adapter"):
        adapter = adapter_to_train(session, settings, train_set, start, checkpoint)
    conditioner = _conditioner(adapter, attributes, settings.seed)
    data = TrainingData(train_set, layout, conditioner, pad_id)
    figures = _fit(run, adapter, data, checkpoint, lambda: evaluate(conditioner, "evaluating"))
    scores = _scores(run.record, adapter, conditioner, evaluate)
    known: dict[str, Any] = {"output_dir": str(folder), "method": settings.method, "packed": layout.packed}
    known |= {"resumed_from": checkpoint and str(checkpoint), "side_path_share": shares(adapter, settings, train_set)}
    result = TrainResult(**known, **counts, **figures, **scores, **_rows(train_set))
    _write(run, adapter, result)
    return result


# Likelihood of the evaluation rows under a condition, and the name of the stage.
_Evaluate = Callable[[Conditioner | None, str], Likelihood | None]


@dataclass(frozen=True)
class _Run:
    """What stays the same from the beginning of a run to its end."""

    session: Session
    settings: TrainSettings
    folder: Path
    report: Report
    attributes: list[Attribute]
    record: Record
    timings: Timings
    chat: bool

    def write(self, adapter: Adapter | PeftAdapter, folder: Path, tensors: dict[str, Any], card: str) -> None:
        """The files of an adapter folder, the config last."""
        config = _config(self, adapter)
        if isinstance(adapter, PeftAdapter):
            adapter.save(folder, config, card)
            return
        if self.attributes:
            save_attributes(folder / TRAINED_FILE, self.attributes)
        write_adapter(folder, tensors, config, card)


def _attributes(
    session: Session, settings: TrainSettings, sets: Sequence[Examples | Stream | None], start: StoredAdapter | None
) -> list[Attribute]:
    if settings.attribute_field is None:
        return []
    present = [examples for examples in sets if examples is not None]
    return gather_attributes(session, settings, present, settings.attributes, start)


def _conditioner(adapter: Adapter | PeftAdapter, attributes: Sequence[Attribute], seed: int) -> Conditioner | None:
    if not attributes or not isinstance(adapter, Adapter):
        return None
    if adapter.mlp is None:
        adapter.add_mlp(seed)
    return Conditioner(adapter, attributes)


def _measure_base(record: Record, evaluate: _Evaluate) -> None:
    """Note the base's likelihood, unless an earlier call of this run did."""
    if record.base is None:
        measured = evaluate(None, "evaluating the base")
        record.base = None if measured is None else cast(BaseLikelihood, vars(measured))


def _scores(
    record: Record, adapter: Adapter | PeftAdapter, conditioner: Conditioner | None, evaluate: _Evaluate
) -> dict[str, Any]:
    """The result's figures of the evaluation rows, of base and adapter."""
    tuned = evaluate(conditioner, "evaluating the adapter")
    if isinstance(adapter, Adapter):
        with adapter.disabled():
            _measure_base(record, evaluate)
    base = None if record.base is None else Likelihood(**record.base)
    return {**_likelihood("base_eval", base), **_likelihood("eval", tuned)}


def _fit(
    run: _Run,
    adapter: Adapter | PeftAdapter,
    data: TrainingData,
    checkpoint: Path | None,
    evaluate: Callable[[], Likelihood | None],
) -> dict[str, Any]:
    """Train; leave in the model what will be saved; return the figures of the steps."""
    # accelerate is not imported for a run that is refused.
    with run.timings.stage("importing accelerate"):
        from braces_cli.training.loop import Trainer, TrainerContext, all_finite, diverged

    def snapshot() -> Callable[[Path], None]:
        tensors = adapter.tensors(in_place=False)
        return lambda folder: run.write(adapter, folder, tensors, CHECKPOINT_CARD)

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with deferred() as stop:
        context = TrainerContext(run.folder, run.record, snapshot, evaluate, run.settings, run.report, stop)
        with run.timings.stage("optimizer and launcher"):
            trainer = Trainer(adapter, run.settings, data, context)
        run.timings.log("before the first step")
        trainer.run(checkpoint)
    if trainer.stopped_by:
        logger.info("stopped after step %d; continue with --resume", trainer.step)
        signal.raise_signal(signal.Signals(trainer.stopped_by))
    memory, progress = _peak_memory(), trainer.progress()
    if not all_finite(adapter.model):
        raise diverged(f"the adapter is not finite after step {trainer.step}", run.folder)
    if not trainer.is_fsdp:
        # Saving settles the projection to what the file holds, so that it is the saved adapter that is measured.
        adapter.tensors()
    if isinstance(data.examples, Stream):
        log_counts(data.examples.counts, run.settings.max_length)
    return {
        "steps": trainer.step,
        # The length of a pass over a stream is not known.
        "epochs": trainer.epoch if isinstance(data.examples, Examples) else None,
        "train_loss": (progress["loss_sum"] + progress["loss_open"]) / max(trainer.step, 1),
        "seconds": progress["seconds"],
        "tokens": progress["tokens"],
        "tokens_per_second": progress["tokens"] / progress["seconds"],
        "peak_memory": memory,
        "padding_share": 1 - progress["tokens"] / max(progress["computed"], 1),
    }


def _peak_memory() -> int:
    """Bytes: of the GPU where there is one, else of the whole process (which `ru_maxrss` counts in KiB on Linux)."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _write(run: _Run, adapter: Adapter | PeftAdapter, result: TrainResult) -> None:
    """The adapter, its picture and card, and last of all the record that says the run has finished."""
    tensors = adapter.tensors(in_place=world_size() == 1)
    if is_main():
        folder, figures = run.folder, asdict(result)
        config = _config(run, adapter)
        drawn = draw_curve(folder, {0: result.base_eval_loss, result.steps: result.eval_loss})
        run.write(adapter, folder, tensors, model_card(config, figures, run.record.settings, run.record.command, drawn))
        Record(**{**vars(run.record), "result": figures}).write(folder)
    barrier()


def _config(run: _Run, adapter: Adapter | PeftAdapter) -> AdapterConfig:
    settings, session = run.settings, run.session
    chosen = {"layers": None if settings.layers is None else adapter.layers, "chat_template": run.chat}
    base = session.base
    return AdapterConfig(
        base_model_name_or_path=base.name,
        revision=base.revision,
        r=adapter.rank,
        layers=adapter.layers,
        fingerprint=base.fingerprint,
        tokenizer=base.tokenizer_hashes,
        training={**settings.recorded(), **chosen},
        attributes=[attribute.name for attribute in run.attributes],
        versions=versions(),
        method=settings.method,
        relevance_scale=list(adapter.scales),
    )


def _likelihood(prefix: str, measured: Likelihood | None) -> dict[str, Any]:
    return {
        f"{prefix}_loss": None if measured is None else measured.loss,
        f"{prefix}_perplexity": None if measured is None else measured.perplexity,
        f"{prefix}_perplexity_without_eos": None if measured is None else measured.perplexity_without_eos,
    }


def _rows(examples: Examples | Stream) -> dict[str, Any]:
    return {"rows": examples.rows, "rows_truncated": examples.truncated, "rows_dropped": examples.dropped}
