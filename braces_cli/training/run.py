"""Train an adapter and measure it: rows -> adapter folder and figures."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from braces_cli.core.adapter import Adapter, AdapterConfig, attach, write_adapter
from braces_cli.core.attributes import TRAINED_FILE, Attribute, save_attributes
from braces_cli.core.condition import condition_shapes
from braces_cli.core.distributed import barrier, is_main, join, world_size
from braces_cli.core.errors import BracesError
from braces_cli.core.ffn import parameter_total
from braces_cli.core.interrupt import act, deferred
from braces_cli.core.models import input_device, tokenizer_hashes
from braces_cli.core.progress import Report, silent
from braces_cli.core.session import Session
from braces_cli.core.versions import versions
from braces_cli.data.examples import Examples
from braces_cli.scoring.perplexity import Likelihood
from braces_cli.training.card import CHECKPOINT_CARD, model_card
from braces_cli.training.conditions import Conditioner, gather_attributes
from braces_cli.training.measure import measure
from braces_cli.training.memory import peak_memory, reset_memory
from braces_cli.training.metrics import draw_curve
from braces_cli.training.record import Record, digest, start, tidy
from braces_cli.training.settings import TrainSettings, Upkeep

logger = logging.getLogger("braces")


@dataclass(frozen=True)
class TrainResult:
    """What a run gave: the keys of `braces train --format json`.

    Times in seconds, memory in bytes, None where not measured. `rows_truncated` were cut to the maximum length and
    `rows_dropped` had no token to score.
    """

    output_dir: str
    method: str
    trainable_parameters: int
    condition_parameters: int
    total_parameters: int
    trainable_percent: float
    steps: int
    epochs: float
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
    resumed_from: str | None = None


def count_parameters(model: Any, settings: TrainSettings) -> dict[str, Any]:
    """`{trainable_parameters, condition_parameters, total_parameters, trainable_percent}`, on any device, meta too."""
    total = parameter_total(model)
    adapter = attach(model, settings.rank, settings.layers)
    trainable = adapter.parameter_count()
    width = adapter.sites[0][0].hidden_size
    adapter.detach()
    condition = sum(math.prod(shape) for shape in condition_shapes(width).values())
    return {
        "trainable_parameters": trainable,
        "condition_parameters": condition if settings.attribute_field is not None else 0,
        "total_parameters": total,
        "trainable_percent": 100 * trainable / total,
    }


def run_training(
    session: Session,
    train_set: Examples,
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
    join(input_device(model))
    counts = count_parameters(model, settings)
    attributes = _attributes(session, settings, [train_set, eval_set], attributes_folder)
    run = _Run(session, settings, upkeep or Upkeep(), folder, report, attributes, record or Record())
    run.record.data = digest(train_set)
    checkpoint = start(folder, run.upkeep.resume, run.record)

    def evaluate(conditioner: Conditioner | None, stage: str) -> Likelihood | None:
        return measure(model, eval_set, conditioner, pad_id, settings.batch_size, report, stage)

    base = _base(run.record, lambda: evaluate(None, "evaluating the base"))
    with tidy(folder):
        adapter = attach(model, settings.rank, settings.layers, settings.seed)
        conditioner = None
        if attributes:
            adapter.add_mlp(settings.seed)
            conditioner = Conditioner(adapter, attributes)
        fitted = _fit(run, adapter, train_set, conditioner, checkpoint, lambda: evaluate(conditioner, "evaluating"))
        tuned = evaluate(conditioner, "evaluating the adapter")
        result = TrainResult(
            output_dir=str(folder),
            method="braces",
            **counts,
            **fitted,
            **_figures("base_eval", base),
            **_figures("eval", tuned),
            rows=train_set.rows,
            rows_truncated=train_set.truncated,
            rows_dropped=train_set.dropped,
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

    def write(self, adapter: Adapter, folder: Path, tensors: dict[str, Any], card: str) -> None:
        """The files of an adapter folder, the config last."""
        if self.attributes:
            save_attributes(folder / TRAINED_FILE, self.attributes)
        write_adapter(folder, tensors, _config(self.session, adapter, self.settings, self.attributes), card)


def _attributes(
    session: Session, settings: TrainSettings, sets: Sequence[Examples | None], folder: Path | None
) -> list[Attribute]:
    if settings.attribute_field is None:
        return []
    return gather_attributes(session, settings, [examples for examples in sets if examples is not None], folder)


def _base(record: Record, evaluate: Callable[[], Likelihood | None]) -> Likelihood | None:
    """The base's likelihood, as an earlier call measured it where there was one."""
    if record.base is None:
        measured = evaluate()
        record.base = None if measured is None else vars(measured)
    return None if record.base is None else Likelihood(**record.base)


def _fit(
    run: _Run,
    adapter: Adapter,
    train_set: Examples,
    conditioner: Conditioner | None,
    checkpoint: Path | None,
    evaluate: Callable[[], Likelihood | None],
) -> dict[str, Any]:
    """Train; leave in the model what will be saved; return what there is to tell about the steps."""
    from braces_cli.training.resumable import DIVERGED, Surroundings, finite
    from braces_cli.training.trainer import BracesTrainer

    def snapshot() -> Callable[[Path], None]:
        tensors, card = adapter.tensors(settle=False), CHECKPOINT_CARD
        return lambda folder: run.write(adapter, folder, tensors, card)

    reset_memory()
    with deferred() as asked:
        around = Surroundings(run.folder, run.record, snapshot, evaluate, run.upkeep, run.report, asked)
        trainer = BracesTrainer(
            adapter, run.settings, train_set, conditioner, run.session.base.tokenizer.pad_token_id, around
        )
        trainer.run(checkpoint)
    if trainer.stopped_by:
        logger.info("stopped after step %d; --resume goes on from there", trainer.done["step"])
        act(trainer.stopped_by)
    memory, done = peak_memory(), trainer.done
    if not finite(trainer.model):
        raise BracesError(DIVERGED.format("adapter holds numbers that are"), hint="Lower --lr or --gate-lr.")
    if not trainer.is_fsdp_enabled:
        # Saving settles the projection to what the file holds, so that it is the saved adapter that is measured.
        adapter.tensors()
    return {
        "steps": done["step"],
        "epochs": float(trainer.state.epoch or 0.0),
        "train_loss": (done["loss_sum"] + done["loss_open"]) / max(done["step"], 1),
        "seconds": done["seconds"],
        "tokens": done["tokens"],
        "tokens_per_second": done["tokens"] / done["seconds"],
        "peak_memory": memory,
    }


def _write(run: _Run, adapter: Adapter, result: TrainResult) -> None:
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
    session: Session, adapter: Adapter, settings: TrainSettings, attributes: Sequence[Attribute]
) -> AdapterConfig:
    base = session.base
    return AdapterConfig(
        base_model_name_or_path=base.name,
        revision=base.revision,
        r=adapter.rank,
        layers=adapter.layers,
        fingerprint=base.fingerprint(session.ffns),
        tokenizer=tokenizer_hashes(base.tokenizer),
        training=asdict(settings),
        attributes=[attribute.name for attribute in attributes],
        versions=versions(),
    )


def _figures(prefix: str, measured: Likelihood | None) -> dict[str, Any]:
    return {
        f"{prefix}_loss": None if measured is None else measured.loss,
        f"{prefix}_perplexity": None if measured is None else measured.perplexity,
        f"{prefix}_perplexity_without_end": None if measured is None else measured.perplexity_without_end,
    }
