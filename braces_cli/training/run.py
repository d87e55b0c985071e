"""Train an adapter and measure it: rows -> adapter folder and figures."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from braces_cli.core.adapter import Adapter, AdapterConfig, attach
from braces_cli.core.attributes import TRAINED_FILE, Attribute, save_attributes
from braces_cli.core.condition import condition_shapes
from braces_cli.core.errors import BracesError
from braces_cli.core.ffn import parameter_total
from braces_cli.core.models import tokenizer_hashes
from braces_cli.core.progress import Report, silent
from braces_cli.core.session import Session
from braces_cli.core.versions import versions
from braces_cli.data.examples import Examples, tell
from braces_cli.data.stream import Stream
from braces_cli.scoring.perplexity import Likelihood, likelihoods
from braces_cli.training.baselines import PeftAdapter, baseline_parameters
from braces_cli.training.card import model_card
from braces_cli.training.conditions import Conditioner, gather_attributes
from braces_cli.training.layout import choose_layout
from braces_cli.training.methods import fresh_adapter, shares
from braces_cli.training.settings import TrainSettings

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
    adapter = attach(model, settings.rank, settings.layers)
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
) -> TrainResult:
    """Fine-tune a fresh adapter on an open base and write it to `folder`.

    The base is measured on `eval_set` first, with nothing attached, then the adapter as it was saved, each row
    conditioned on its own attribute where attributes are trained.

    Raises:
        DataError: a row names an unknown attribute.
        ConfigError: rank or layers that do not fit the base.
        BracesError: the loss is not finite, or the folder cannot be written.
    """
    from braces_cli.training.trainer import BracesTrainer

    model, pad_id = session.base.model, session.base.tokenizer.pad_token_id
    counts = count_parameters(model, settings)
    batch = settings.batch_size
    attributes: list[Attribute] = []
    if settings.attribute_field is not None:
        sets: list[Examples | Stream] = [train_set] if eval_set is None else [train_set, eval_set]
        attributes = gather_attributes(session, settings, sets, attributes_folder)
    layout = choose_layout(session, settings, train_set.items)
    base = _measure(model, eval_set, None, pad_id, batch, report, "evaluating the base")

    adapter = fresh_adapter(model, settings, train_set)
    share = shares(adapter, settings, train_set)
    conditioner = None
    if attributes and isinstance(adapter, Adapter):
        adapter.add_mlp(settings.seed)
        conditioner = Conditioner(adapter, attributes)
    existed = folder.exists()
    _reset_memory()
    started = time.perf_counter()
    try:
        trainer = BracesTrainer(adapter, settings, train_set, layout, conditioner, pad_id, str(folder), report)
        outcome = trainer.train()
        seconds = time.perf_counter() - started
        memory = _peak_memory()
        _check_finite(adapter)
        # Saving settles the projection to what the file holds, so that it is the saved adapter that is measured.
        adapter.tensors()
        tuned = _measure(model, eval_set, conditioner, pad_id, batch, report, "evaluating the adapter")
        result = TrainResult(
            output_dir=str(folder),
            method=settings.method,
            **counts,
            steps=outcome.global_step,
            # Of a stream nobody knows how long a pass is.
            epochs=float(trainer.state.epoch or 0.0) if isinstance(train_set, Examples) else None,
            train_loss=outcome.training_loss,
            **_figures("base_eval", base),
            **_figures("eval", tuned),
            seconds=seconds,
            tokens=trainer.tokens,
            tokens_per_second=trainer.tokens / seconds,
            peak_memory=memory,
            rows=train_set.rows,
            rows_truncated=train_set.truncated,
            rows_dropped=train_set.dropped,
            token_path_share=share,
            packed=layout.packed,
            padding_share=trainer.padding_share,
        )
        if isinstance(train_set, Stream):
            tell(train_set.counts, settings.max_length)
        config = _config(session, adapter, settings, attributes)
        if attributes:
            save_attributes(folder / TRAINED_FILE, attributes)
        adapter.save(folder, config, model_card(config, asdict(result)))
    finally:
        # Trainer makes the folder before there is anything to put into it.
        if not existed and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
    return result


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
    )


def _figures(prefix: str, measured: Likelihood | None) -> dict[str, Any]:
    return {
        f"{prefix}_loss": None if measured is None else measured.loss,
        f"{prefix}_perplexity": None if measured is None else measured.perplexity,
        f"{prefix}_perplexity_without_end": None if measured is None else measured.perplexity_without_end,
    }


def _measure(
    model: Any,
    examples: Examples | None,
    conditioner: Conditioner | None,
    pad_id: int,
    batch_size: int,
    report: Report,
    stage: str,
) -> Likelihood | None:
    if examples is None:
        return None
    rows = examples.conditions

    def condition(batch: Sequence[int]) -> None:
        if conditioner is not None:
            with torch.no_grad():
                conditioner.apply(conditioner.strengths([rows[row] for row in batch]))

    try:
        return _total(likelihoods(model, examples.items, pad_id, batch_size, report, stage, condition))
    finally:
        if conditioner is not None:
            conditioner.clear()


def _total(parts: Sequence[Likelihood]) -> Likelihood:
    """Sum over examples, so that every token counts the same."""
    return sum(parts, Likelihood())


def _check_finite(adapter: Adapter | PeftAdapter) -> None:
    parameters = [p for _, p in adapter.named_parameters()] + (
        [] if adapter.mlp is None else [*adapter.mlp.parameters()]
    )
    if not all(bool(p.isfinite().all()) for p in parameters):
        raise BracesError(
            "training diverged: the adapter holds numbers that are not finite", hint="Lower --lr or --gate-lr."
        )


def _reset_memory() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def _peak_memory() -> int:
    """Bytes: of the GPU where there is one, else of the whole process (which `ru_maxrss` counts in KiB on Linux)."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
