"""The training loop, on accelerate's public interface: batches -> loss -> gradients -> optimizer step.

Around it: a checkpoint every few steps (`checkpointing`), rows of `metrics.jsonl` and a reporter, measurements of the
evaluation rows, and the end of the run when a signal asks for it. A run that goes on from a checkpoint is bit for bit
the run that was not interrupted.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, DistributedType
from accelerate.state import is_initialized
from accelerate.utils import set_seed
from torch import Tensor
from transformers.optimization import get_scheduler

from braces_cli.core.adapter.model import Adapter
from braces_cli.core.distributed import SharedStop, StopRequest, barrier, gathered, is_main, rank, world_size
from braces_cli.core.errors import BracesError
from braces_cli.core.models.load import input_device
from braces_cli.core.progress import Report, silent
from braces_cli.data.dataset import Example, Stream
from braces_cli.scoring.likelihood import Likelihood
from braces_cli.training.baselines import PeftAdapter
from braces_cli.training.batching import Batch, Block, Collator, TrainingData, example_order, steps_per_epoch
from braces_cli.training.checkpoint import (
    capture,
    newest,
    restore_optimizer,
    restore_parameters,
    restore_rng,
    rotate,
    trained,
    write_checkpoint,
)
from braces_cli.training.loss import PAIR_TERMS, contrastive_loss, mean_loss, only_scored, token_nll
from braces_cli.training.record import Record, read_progress
from braces_cli.training.report import METRICS_FILE, MetricsFile
from braces_cli.training.settings import TrainSettings, capped_warmup
from braces_cli.training.setup import parameter_groups

logger = logging.getLogger("braces")

# Gradients of a step are scaled down to this norm where they are longer.
MAX_GRAD_NORM = 1.0
_SCHEDULES = {"constant": "constant_with_warmup"}


@dataclass
class TrainerContext:
    """What a trainer works with besides model and examples.

    Attributes:
        folder: of the output.
        record: goes into every checkpoint.
        adapter: gathers the adapter as it is now, in every process; what it returns writes that to a folder.
        evaluate: measures the evaluation rows; None where there are none.
        report: draws progress.
        stop: whether a signal asked to stop.
    """

    folder: Path
    record: Record
    adapter: Callable[[], Callable[[Path], None]]
    evaluate: Callable[[], Likelihood | None]
    checkpoints: TrainSettings
    report: Report = silent
    stop: StopRequest = field(default_factory=StopRequest)


class Trainer:
    """Optimises an adapter, each part at its own rate.

    Attributes:
        step: optimizer steps that are done, those of earlier calls included.
        stopped_by: the signal that ended `run`, 0 where it came to its end.
    """

    def __init__(
        self, adapter: Adapter | PeftAdapter, settings: TrainSettings, data: TrainingData, context: TrainerContext
    ) -> None:
        set_seed(settings.seed)
        self._settings, self._data, self._context = settings, data, context
        self._base: Any = adapter.model
        self._device = input_device(self._base)
        self._collate = Collator(data.layout, data.pad_id, data.conditioner)
        self._per_epoch = steps_per_epoch(data.examples, settings)
        self.step, self.max_steps = 0, settings.max_steps or math.ceil(settings.epochs * (self._per_epoch or 0))
        self.stopped_by = 0
        self._accelerator = _accelerator(context, self._device)
        self._kind = self._accelerator.distributed_type
        if settings.gradient_checkpointing:
            _recompute_activations(self._base)
        # Who recomputes or shards has no memory to spare.
        if isinstance(adapter, Adapter) and (settings.gradient_checkpointing or self.is_fsdp):
            adapter.save_memory()
        # No weight decay: R does not depend on the length of the rows of its weight.
        optimizer = torch.optim.AdamW(parameter_groups(adapter, settings), weight_decay=0.0)
        self._model, self._optimizer = self._accelerator.prepare(self._base, optimizer)
        name = _SCHEDULES.get(settings.schedule, settings.schedule)
        warmup = capped_warmup(settings.warmup_steps, self.max_steps)
        if warmup < settings.warmup_steps and is_main():
            cut = "the warm-up is cut from %d to %d steps, a quarter of the run"
            logger.info(cut, settings.warmup_steps, warmup)
        self._scheduler = get_scheduler(name, self._optimizer, warmup, self.max_steps)
        # Counters of earlier calls, over all processes; and of this call and process.
        self._earlier: dict[str, Any] = {}
        self._tokens = self._computed = 0
        # Losses of the steps that are in a log, and on the device of those since.
        self._loss_sum, self._logged = 0.0, 0
        self._loss_open = torch.zeros((), device=self._device)
        self._rates: dict[str, float] = {}
        self._norm: Any = None
        self._started = time.perf_counter()
        self._last_log: tuple[float, int] | None = None
        self._shown = ""

    @property
    def is_fsdp(self) -> bool:
        return bool(self._kind == DistributedType.FSDP)

    @property
    def epoch(self) -> float:
        """Passes over the data; of a stream the part of the steps that is done."""
        length = self._per_epoch or self.max_steps
        whole, rest = divmod(self.step - 1, length)
        return whole + (rest + 1) / length if self.step else 0.0

    def run(self, checkpoint: Path | None) -> None:
        """Train to the end, or from `checkpoint` to the end, or until a signal asks to stop.

        Raises:
            BracesError: the loss is not finite, or a checkpoint cannot be written.
            ModelError: the checkpoint is damaged.
        """
        if checkpoint is not None:
            self._restore(checkpoint)
        unfinished = self.step < self.max_steps
        order = example_order(self._data.examples, self._settings, self.step) if unfinished else iter(())
        if checkpoint is not None and unfinished:
            restore_rng(checkpoint)  # the last file that can be damaged: nothing was written before
        self._metrics = MetricsFile(self._context.folder / METRICS_FILE, self.step) if is_main() else None
        if not unfinished:
            return
        if self._context.checkpoints.report_to != "none":
            recorded = self._settings.recorded().items()
            config = {name: v if isinstance(v, (bool, int, float, str)) else str(v) for name, v in recorded}
            self._accelerator.init_trackers("braces", config)
            if checkpoint is not None:
                restore_rng(checkpoint)  # reporters may draw numbers
        self._started = time.perf_counter()
        shared = SharedStop(self._context.stop, self._device)
        while self.step < self.max_steps and not self.stopped_by:
            self._model.train()
            self._train_step(list(self._batches(order)))
            self._context.report(f"training{self._shown}", self.step, self.max_steps)
            self.stopped_by = shared.number()
            self._after_step()
        shared.finish()
        late = max(gathered(self._context.stop.number))
        if late and not self.stopped_by:  # asked after the last step
            self.stopped_by = late
            self._save()
        for tracker in self._accelerator.trackers:
            tracker.finish()

    def progress(self) -> dict[str, Any]:
        """Counters that go on where the run does, over all processes and calls; every process must ask."""
        examples = self._data.examples
        return {
            "step": self.step,
            "max_steps": self.max_steps,
            "tokens": self._all_tokens(),
            "computed": self._earlier.get("computed", 0) + sum(gathered(self._computed)),
            "seconds": self._earlier.get("seconds", 0.0) + time.perf_counter() - self._started,
            # Of the steps before the last log, and of those since.
            "loss_sum": self._loss_sum,
            "loss_open": sum(gathered(float(self._loss_open))) / world_size(),
            "logged": self._logged,
            **({"stream": dict(vars(examples.counts))} if isinstance(examples, Stream) else {}),
        }

    def _restore(self, checkpoint: Path) -> None:
        earlier = read_progress(checkpoint)
        self._earlier, self.step = dict(earlier), earlier["step"]
        self._loss_sum, self._logged = earlier["loss_sum"], earlier["logged"]
        self._loss_open.fill_(earlier["loss_open"])
        if isinstance(self._data.examples, Stream) and "stream" in earlier:
            # Of a run that has all its steps behind it; any other reads these rows again.
            self._data.examples.counts = earlier["stream"]
        restore_parameters(checkpoint, self._base)
        if self.step < self.max_steps:
            restore_optimizer(checkpoint, self._optimizer, self._scheduler, self._accelerator.scaler)

    def _batches(self, order: Iterator[Example | None]) -> Iterator[Batch]:
        """This process's batches of the next optimizer step; the others' go by."""
        for _ in range(self._settings.gradient_accumulation):
            for process in range(world_size()):
                rows = list(islice(order, self._settings.batch_size))
                if process == rank():
                    yield self._collate(rows)

    def _train_step(self, batches: Sequence[Batch]) -> None:
        """One optimizer step: the mean loss over all scored tokens of all batches of all processes."""
        # Filled, not copied: nothing waits for the device.
        scored = torch.full((), sum(batch.scored for batch in batches), dtype=torch.float32, device=self._device)
        scored = self._accelerator.reduce(scored, "sum") if world_size() > 1 else scored
        for index, batch in enumerate(batches):
            last = index == len(batches) - 1
            self._accelerator.sync_gradients = last
            with nullcontext() if last else self._accelerator.no_sync(self._model):
                # Gradients of processes are averaged, their losses are to be added up.
                loss = sum(self._block_loss(block, scored) for block in batch.blocks) * world_size()
                self._accelerator.backward(loss)
            self._loss_open += loss.detach().to(self._device)
            self._tokens += batch.tokens
            self._computed += batch.computed
        if self._data.conditioner is not None:
            self._data.conditioner.scatter_gradients()
        self._norm = self._accelerator.clip_grad_norm_(self._model.parameters(), MAX_GRAD_NORM)
        self._rates = {group["name"]: group["lr"] for group in self._optimizer.param_groups if "name" in group}
        self._optimizer.step()
        if not self._accelerator.optimizer_step_was_skipped:
            self._scheduler.step()
        self._model.zero_grad()
        self.step += 1

    def _block_loss(self, block: Block, scored: Tensor) -> Any:
        """What one block adds to the loss of its step."""
        settings, conditioner = self._settings, self._data.conditioner
        block = {name: self._on_device(tensor) for name, tensor in block.items()}
        if conditioner is not None:
            # It stays set until the next block: gradient checkpointing computes the pass once more.
            conditioner.apply(block.pop("strengths"))
        labels, owner = block.pop("labels"), block.pop("owner", None)
        terms = {name: block.pop(name) for name in PAIR_TERMS if name in block}
        with only_scored(self._base, block.pop("scored", None)):
            # With a cache, transformers would not look whether positions start anew.
            logits = self._model(**block, use_cache=False).logits
        if owner is None or settings.contrast is None or settings.margin is None:
            return mean_loss(logits, labels, scored)
        nll = token_nll(logits, labels)
        return contrastive_loss(nll, owner, terms, settings.contrast, settings.margin, scored)

    def _on_device(self, tensor: Tensor) -> Tensor:
        if self._device.type == "cuda":
            return tensor.pin_memory().to(self._device, non_blocking=True)
        return tensor.to(self._device)

    def _after_step(self) -> None:
        """Log, measure and save where this step is due for it."""
        due, last = self._context.checkpoints, self.step >= self.max_steps
        row: dict[str, Any] = {}
        if last or self.step % due.logging_steps == 0:
            row = self._figures()
        # After the last step the adapter is measured as it was saved.
        if due.eval_steps and self.step % due.eval_steps == 0 and not last:
            measured = self._context.evaluate()
            if measured is not None:
                row |= {"eval_loss": measured.loss, "eval_perplexity": measured.perplexity}
        if row:
            if self._metrics is not None:
                self._metrics.add({"step": self.step, "epoch": self.epoch, **row})
            self._accelerator.log(reported(row), step=self.step)
        # After the last step, too: an evaluation follows, and may be cut off.
        if self.stopped_by or (due.save_steps and (last or self.step % due.save_steps == 0)):
            self._save()

    def _figures(self) -> dict[str, Any]:
        """Mean loss since the last log, rates, gradient norm, and the speed; the only numbers read from the device."""
        loss_sum = sum(gathered(float(self._loss_open))) / world_size()
        loss = loss_sum / (self.step - self._logged)
        if not math.isfinite(loss):
            first = self._logged + 1
            when = f"at step {first}" if first == self.step else f"between steps {first} and {self.step}"
            raise diverged(f"the loss is not finite {when}", self._context.folder)
        self._loss_sum, self._logged = self._loss_sum + loss_sum, self.step
        self._loss_open.zero_()
        now, tokens = time.perf_counter(), self._all_tokens()
        before, counted = self._last_log or (self._started, int(self._earlier.get("tokens", 0)))
        self._last_log = (now, tokens)
        speed = (tokens - counted) / max(now - before, 1e-9)
        self._shown = f": loss {loss:.3f}, {speed:,.0f} tokens/s"
        norm = {} if self._norm is None else {"grad_norm": float(self._norm)}
        return {"loss": loss, **self._rates, **norm, "tokens": tokens, "tokens_per_second": speed}

    def _all_tokens(self) -> int:
        return int(self._earlier.get("tokens", 0)) + sum(gathered(self._tokens))

    def _save(self) -> None:
        """Write a checkpoint; every process takes part, the first one writes."""
        context = self._context
        if not all_finite(self._base):
            raise diverged(f"the adapter is not finite at step {self.step}", context.folder)
        captured = capture(self._base, self._optimizer, self._scheduler, self._accelerator.scaler)
        write_adapter, progress = context.adapter(), self.progress()

        def write(folder: Path) -> None:
            write_adapter(folder)
            captured.write(folder)
            Record(**{**vars(context.record), "progress": progress}).write(folder)

        try:
            if is_main():
                write_checkpoint(context.folder, self.step, write)
                rotate(context.folder, context.checkpoints.save_total_limit)
        finally:
            barrier()


def _accelerator(context: TrainerContext, device: torch.device) -> Accelerator:
    """What the launcher asks for: one process, DDP or FSDP2."""
    reporter = context.checkpoints.report_to
    return Accelerator(
        # The base is on its device already.
        device_placement=False,
        cpu=device.type == "cpu" and not is_initialized(),
        log_with=None if reporter == "none" else reporter,
        project_dir=context.folder / "runs",
        # All that learns is used in every pass, and nothing else of the base changes.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, find_unused_parameters=False)],
    )


def _recompute_activations(model: Any) -> None:
    model.activation_checkpointing_enable({"use_reentrant": False})


def reported(row: dict[str, Any]) -> dict[str, Any]:
    """A row of metrics under the names that reporters group by: `train/loss`, `eval/loss`."""
    return {f"eval/{k[5:]}" if k.startswith("eval_") else f"train/{k}": value for k, value in row.items()}


def diverged(what: str, folder: Path) -> BracesError:
    """The error of a run whose numbers are not finite any more; every checkpoint was checked before it was written."""
    kept = newest(folder)
    usable = f" {kept} was written before and can be used as an adapter." if kept else ""
    return BracesError(f"training diverged: {what}", hint=f"Train again with a lower --lr or --gate-lr.{usable}")


def all_finite(model: Any) -> bool:
    """Whether every trained parameter is a finite number."""
    return all(bool(parameter.isfinite().all()) for parameter in trained(model).values())
