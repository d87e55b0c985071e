"""Train an adapter and measure it: rows -> adapter folder and figures."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from braces_cli.core.attributes.attribute import TRAINED_FILE, Attribute, save_attributes
from braces_cli.core.method.adapter import Adapter, attach
from braces_cli.core.method.adapter_files import AdapterConfig, write_adapter
from braces_cli.core.method.condition_mlp import condition_shapes
from braces_cli.core.models.ffn import parameter_total
from braces_cli.core.models.loading import input_device, tokenizer_hashes
from braces_cli.core.session import Session
from braces_cli.core.utils.distributed import barrier, is_main, join, world_size
from braces_cli.core.utils.errors import BracesError
from braces_cli.core.utils.progress import Report, silent
from braces_cli.core.utils.signals import act, deferred
from braces_cli.core.utils.versions import versions
from braces_cli.data.examples import Examples, tell
from braces_cli.data.streaming_examples import Stream
from braces_cli.scoring.likelihood import Likelihood
from braces_cli.training.adapter_setup import fresh_adapter, shares
from braces_cli.training.attribute_conditioning import Conditioner, gather_attributes
from braces_cli.training.checkpointing.run_record import Record, digest, start, tidy
from braces_cli.training.collator import Layout
from braces_cli.training.eval_loss import measure
from braces_cli.training.memory import peak_memory, reset_memory
from braces_cli.training.metrics import draw_curve
from braces_cli.training.model_card import CHECKPOINT_CARD, model_card
from braces_cli.training.packing_probe import choose_layout
from braces_cli.training.peft_baselines import PeftAdapter, baseline_parameters
from braces_cli.training.settings import TrainSettings, Upkeep

logger = logging.getLogger("braces")

_COUNTS = ("trainable_parameters", "condition_parameters", "total_parameters", "trainable_percent")


@dataclass(frozen=True)
class TrainResult:
    """What a run gave: the keys of `braces train --format json`.

    Times in seconds, memory in bytes, None where not measured. `rows_truncated` were cut to the maximum length and
    `rows_dropped` had no token to score; of a stream, all that were read. `token_path_share`: at the start, in each
    layer, the median norm of what the adapter adds over that of the FFN's output. `padding_share`: the part of the
    computed tokens that was padding; `packed`: several examples a row.
    """

    output_dir: str
    method: str
    trainable_parameters: int
    condition_parameters: int
    total_parameters: int
    trainable_percent: float
    steps: int
    epochs: float | None
    train_loss: float
    base_eval_loss: float | None
    base_eval_perplexity: float | None
    base_eval_perplexity_without_end: float | None
    eval_loss: float | None
    eval_perplexity: float | None
    eval_perplexity_without_end: float | None
    seconds: float
    tokens: int
    tokens_per_second: float
    peak_memory: int
    rows: int
    rows_truncated: int
    rows_dropped: int
    token_path_share: list[float] | None
    packed: bool
    padding_share: float
    resumed_from: str | None = None


def count_parameters(model: Any, settings: TrainSettings) -> dict[str, Any]:
    """`{trainable_parameters, condition_parameters, total_parameters, trainable_percent}`, on any device, meta too."""
    total = parameter_total(model)
    if settings.method != "braces":
        trainable = baseline_parameters(model, settings)
        share = 100 * trainable / total
        return dict(zip(_COUNTS, (trainable, 0, total, share), strict=True))
    adapter = attach(model, settings.rank, settings.layers, form=settings.relevance)
    trainable = adapter.parameter_count()
    width = adapter.sites[0][0].hidden_size
    adapter.detach()
    condition = sum(math.prod(shape) for shape in condition_shapes(width).values())
    condition = condition if settings.attribute_field is not None else 0
    return dict(zip(_COUNTS, (trainable, condition, total, 100 * trainable / total), strict=True))


def run_training(
    session: Session,
    train_set: Examples | Stream,
    eval_set: Examples | None,
    settings: TrainSettings,
    folder: Path,
    report: Report = silent,
    attributes_folder: Path | None = None,
    upkeep: Upkeep | None = None,
    record: Record | None = None,
) -> TrainResult:
    """Fine-tune an adapter on an open base and write it to `folder`, from the newest checkpoint there if so asked.

    The base is measured on `eval_set` first, with nothing attached, then the adapter as it was saved, each row
    conditioned on its own attribute where attributes are trained. Where there are several processes each of them calls
    this, and the first one writes.

    Args:
        record: what the run is known by when it is resumed.

    Raises:
        DataError: a row names an unknown attribute.
        ConfigError: rank or layers that do not fit the base, or a checkpoint of other data.
        ModelError: a checkpoint that cannot be read.
        BracesError: the loss is not finite, or the folder cannot be written.
        KeyboardInterrupt: a signal asked to stop, and a checkpoint was written.
    """
    model, pad_id = session.base.model, session.base.tokenizer.pad_token_id
    settings = settings.at_width(session.ffns[0].hidden_size)
    join(input_device(model))
    counts = count_parameters(model, settings)
    attributes = _attributes(session, settings, [train_set, eval_set], attributes_folder)
    run = _Run(session, settings, upkeep or Upkeep(), folder, report, attributes, record or Record())
    checkpoint = _checkpoint(run, train_set)

    def evaluate(conditioner: Conditioner | None, stage: str) -> Likelihood | None:
        return measure(model, eval_set, conditioner, pad_id, settings.batch_size, report, stage)

    layout = choose_layout(session, settings, train_set.items)
    base = _base(run.record, lambda: evaluate(None, "evaluating the base"))
    with tidy(folder):
        adapter = fresh_adapter(model, settings, train_set)
        share = shares(adapter, settings, train_set)
        conditioner = _conditioner(adapter, attributes, settings.seed)
        feed = _Feed(train_set, layout, conditioner)
        fitted = _fit(run, adapter, feed, checkpoint, lambda: evaluate(conditioner, "evaluating"))
        tuned = evaluate(conditioner, "evaluating the adapter")
        result = TrainResult(
            output_dir=str(folder),
            method=settings.method,
            **counts,
            **fitted,
            **_figures("base_eval", base),
            **_figures("eval", tuned),
            **_rows(train_set),
            token_path_share=share,
            packed=layout.packed,
            resumed_from=None if checkpoint is None else str(checkpoint),
        )
        _write(run, adapter, result)
    return result


@dataclass(frozen=True)
class _Run:
    """What stays the same from the beginning of a run to its end."""

    session: Session
    settings: TrainSettings
    upkeep: Upkeep
    folder: Path
    report: Report
    attributes: list[Attribute]
    record: Record

    def write(self, adapter: Adapter | PeftAdapter, folder: Path, tensors: dict[str, Any], card: str) -> None:
        """The files of an adapter folder, the config last."""
        config = _config(self.session, adapter, self.settings, self.attributes)
        if isinstance(adapter, PeftAdapter):
            adapter.save(folder, config, card)
            return
        if self.attributes:
            save_attributes(folder / TRAINED_FILE, self.attributes)
        write_adapter(folder, tensors, config, card)


@dataclass(frozen=True)
class _Feed:
    """What the steps are fed with."""

    examples: Examples | Stream
    layout: Layout
    conditioner: Conditioner | None


def _checkpoint(run: _Run, train_set: Examples | Stream) -> Path | None:
    """Where the run goes on from, if it does; the record then knows its data."""
    run.record.data = digest(train_set)
    return start(run.folder, run.upkeep.resume, run.record)


def _attributes(
    session: Session, settings: TrainSettings, sets: Sequence[Examples | Stream | None], folder: Path | None
) -> list[Attribute]:
    if settings.attribute_field is None:
        return []
    return gather_attributes(session, settings, [examples for examples in sets if examples is not None], folder)


def _conditioner(adapter: Adapter | PeftAdapter, attributes: Sequence[Attribute], seed: int) -> Conditioner | None:
    if not attributes or not isinstance(adapter, Adapter):
        return None
    adapter.add_mlp(seed)
    return Conditioner(adapter, attributes)


def _base(record: Record, evaluate: Callable[[], Likelihood | None]) -> Likelihood | None:
    """The base's likelihood, as an earlier call measured it where there was one."""
    if record.base is None:
        measured = evaluate()
        record.base = None if measured is None else vars(measured)
    return None if record.base is None else Likelihood(**record.base)


def _fit(
    run: _Run,
    adapter: Adapter | PeftAdapter,
    feed: _Feed,
    checkpoint: Path | None,
    evaluate: Callable[[], Likelihood | None],
) -> dict[str, Any]:
    """Train; leave in the model what will be saved; return what there is to tell about the steps."""
    from braces_cli.training.checkpointing.resumable_trainer import DIVERGED, Surroundings, finite
    from braces_cli.training.trainer import BracesTrainer

    def snapshot() -> Callable[[Path], None]:
        tensors, card = adapter.tensors(settle=False), CHECKPOINT_CARD
        return lambda folder: run.write(adapter, folder, tensors, card)

    reset_memory()
    with deferred() as asked:
        around = Surroundings(run.folder, run.record, snapshot, evaluate, run.upkeep, run.report, asked)
        pad_id = run.session.base.tokenizer.pad_token_id
        trainer = BracesTrainer(adapter, run.settings, feed.examples, feed.layout, feed.conditioner, pad_id, around)
        trainer.run(checkpoint)
    if trainer.stopped_by:
        kept = "nothing is kept under DeepSpeed" if trainer.is_deepspeed_enabled else "--resume goes on from there"
        logger.info("stopped after step %d; %s", trainer.done["step"], kept)
        act(trainer.stopped_by)
    memory, done = peak_memory(), trainer.done
    if not finite(trainer.model):
        raise BracesError(DIVERGED.format("adapter holds numbers that are"), hint="Lower --lr or --gate-lr.")
    if not trainer.is_fsdp_enabled:
        # Saving settles the projection to what the file holds, so that it is the saved adapter that is measured.
        adapter.tensors()
    if isinstance(feed.examples, Stream):
        tell(feed.examples.counts, run.settings.max_length)
    return {
        "steps": done["step"],
        # Of a stream nobody knows how long a pass is.
        "epochs": float(trainer.state.epoch or 0.0) if isinstance(feed.examples, Examples) else None,
        "train_loss": (done["loss_sum"] + done["loss_open"]) / max(done["step"], 1),
        "seconds": done["seconds"],
        "tokens": done["tokens"],
        "tokens_per_second": done["tokens"] / done["seconds"],
        "peak_memory": memory,
        "padding_share": 1 - done["tokens"] / max(done["computed"], 1),
    }


def _write(run: _Run, adapter: Adapter | PeftAdapter, result: TrainResult) -> None:
    """The adapter, its picture and card, and last of all the record that says the run has finished."""
    tensors = adapter.tensors(settle=world_size() == 1)
    if is_main():
        folder, figures = run.folder, asdict(result)
        config = _config(run.session, adapter, run.settings, run.attributes)
        drawn = draw_curve(folder, {0: result.base_eval_loss, result.steps: result.eval_loss})
        run.write(adapter, folder, tensors, model_card(config, figures, run.record.settings, run.record.command, drawn))
        Record(**{**vars(run.record), "result": figures}).write(folder)
    barrier()


def _config(
    session: Session, adapter: Adapter | PeftAdapter, settings: TrainSettings, attributes: Sequence[Attribute]
) -> AdapterConfig:
    base = session.base
    return AdapterConfig(
        base_model_name_or_path=base.name,
        revision=base.revision,
        r=adapter.rank,
        layers=adapter.layers,
        fingerprint=base.fingerprint(session.ffns),
        tokenizer=tokenizer_hashes(base.tokenizer),
        training=settings.recorded(),
        attributes=[attribute.name for attribute in attributes],
        versions=versions(),
        method=settings.method,
        scales=list(adapter.scales),
        relevance=settings.relevance if settings.method == "braces" else "paper",
    )


def _figures(prefix: str, measured: Likelihood | None) -> dict[str, Any]:
    return {
        f"{prefix}_loss": None if measured is None else measured.loss,
        f"{prefix}_perplexity": None if measured is None else measured.perplexity,
        f"{prefix}_perplexity_without_end": None if measured is None else measured.perplexity_without_end,
    }


def _rows(examples: Examples | Stream) -> dict[str, int]:
    return {"rows": examples.rows, "rows_truncated": examples.truncated, "rows_dropped": examples.dropped}
