"""The training loop on accelerate: batches -> loss -> gradients -> optimizer step.

Also writes checkpoints, metrics and evaluations when they are due, and stops after a signal. A resumed run is
bit-identical to a run that was not interrupted.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, DistributedType
from accelerate.state import is_initialized
from accelerate.utils import set_seed
from torch import Tensor
from transformers.optimization import get_scheduler

from braces_cli.core.adapter.model import Adapter
from braces_cli.core.distributed import SharedStop, StopRequest, barrier, gathered, is_main, rank, world_size
from braces_cli.core.errors import BracesError, logger
from braces_cli.core.models.load import input_device
from braces_cli.core.models.structure import only_scored
from braces_cli.core.progress import Report
from braces_cli.data.dataset import Example, Stream
from braces_cli.scoring.likelihood import Likelihood
from braces_cli.training import checkpoint as checkpointing
from braces_cli.training.baselines import PeftAdapter
from braces_cli.training.batching import Batch, Block, TrainingData, collate, example_order, global_batch
from braces_cli.training.loss import PAIR_TERMS, contrastive_loss, token_nll
from braces_cli.training.report import CHECKPOINT_CARD, METRICS_FILE, MetricsFile
from braces_cli.training.settings import TrainSettings

# Gradients of a step are clipped to this norm.
MAX_GRAD_NORM = 1.0


class Trainer:
    """Optimise an adapter, each part at a separate learning rate.

    Args:
        record: written into every checkpoint, with the counters of that step.
        write: writes a model card and the tensors of the adapter to a folder.
        evaluate: likelihood of the evaluation rows; None if there are none.
        stop: signal received by this process.

    Attributes:
        step: completed optimizer steps, including those before a resumption.
        stopped_by: the signal that ended `run`, else 0.
    """

    def __init__(
        self,
        adapter: Adapter | PeftAdapter,
        settings: TrainSettings,
        data: TrainingData,
        record: checkpointing.Record,
        write: Callable[[str, dict[str, Tensor], Path], None],
        evaluate: Callable[[], Likelihood | None],
        report: Report,
        stop: StopRequest,
    ) -> None:
        assert settings.output_dir is not None
        set_seed(settings.seed)
        self._settings, self._data, self._record, self._folder = settings, data, record, settings.output_dir
        self._adapter, self._write, self._evaluate, self._report, self._stop = adapter, write, evaluate, report, stop
        self._base = cast(Any, adapter.model)
        self._device = input_device(self._base)
        self._per_epoch = None
        if not isinstance(data.examples, Stream):
            self._per_epoch = math.ceil(len(data.examples.items) / global_batch(settings))
        self.step, self.max_steps = 0, settings.max_steps or math.ceil(settings.epochs * (self._per_epoch or 0))
        self.stopped_by = 0
        self._accelerator = Accelerator(
            # The base is on its device already.
            device_placement=False,
            cpu=self._device.type == "cpu" and not is_initialized(),
            log_with=None if settings.report_to == "none" else settings.report_to,
            project_dir=self._folder / "runs",
            # All trained parameters are used in every pass, and the base has no buffers that change.
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, find_unused_parameters=False)],
        )
        self.is_fsdp = self._accelerator.distributed_type == DistributedType.FSDP
        if settings.gradient_checkpointing:
            self._base.activation_checkpointing_enable({"use_reentrant": False})
        # Gradient checkpointing and FSDP imply that memory is scarce.
        if isinstance(adapter, Adapter) and (settings.gradient_checkpointing or self.is_fsdp):
            for _, adapter_layer in adapter.adapted_ffns:
                adapter_layer.cache_gram(False)
        # No weight decay: R does not depend on the length of the rows of its weight.
        optimizer = torch.optim.AdamW(parameter_groups(adapter, settings), weight_decay=0.0)
        self._model, self._optimizer = self._accelerator.prepare(self._base, optimizer)
        # At most a quarter of all steps, so that the peak rate is reached.
        warmup = min(settings.warmup_steps, self.max_steps // 4)
        if warmup < settings.warmup_steps and is_main():
            cut = "the warm-up is cut from %d to %d steps, a quarter of the run"
            logger.info(cut, settings.warmup_steps, warmup)
        schedule = "constant_with_warmup" if settings.schedule == "constant" else settings.schedule
        self._scheduler = get_scheduler(schedule, self._optimizer, warmup, self.max_steps)
        # Counters before a resumption over all processes; tokens since then of this process.
        self._earlier = checkpointing.Progress(0, self.max_steps)
        self._tokens = self._computed = 0
        # Losses of the logged steps, and on the device those of the steps since the last log.
        self._loss_sum, self._logged = 0.0, 0
        self._loss_open = torch.zeros((), device=self._device)
        self._contrast_open = torch.zeros((), device=self._device)  # the contrastive part
        self._rates: dict[str, float] = {}
        self._norm: Any = None
        self._started = time.perf_counter()
        self._last_log: tuple[float, int] | None = None
        self._shown = ""

    @property
    def epoch(self) -> float:
        """Passes over the data; of a stream, the completed share of the steps."""
        length = self._per_epoch or self.max_steps
        whole, rest = divmod(self.step - 1, length)
        return whole + (rest + 1) / length if self.step else 0.0

    def run(self, checkpoint: Path | None) -> None:
        """Train from the start or from `checkpoint` to the end, or until a signal.

        Raises:
            BracesError: the loss or the adapter is not finite, or a checkpoint cannot be written.
            ModelError: the checkpoint is damaged.
        """
        settings, examples = self._settings, self._data.examples
        if checkpoint is not None:
            self._earlier = earlier = checkpointing.read_progress(checkpoint)
            self.step, self._loss_sum, self._logged = earlier.step, earlier.loss_sum, earlier.logged
            self._loss_open.fill_(earlier.loss_open)
            self._contrast_open.fill_(earlier.contrast_open)
            if isinstance(examples, Stream) and earlier.stream is not None:
                # Of a run with all steps completed; any other run reads these rows again.
                examples.counts = earlier.stream
            checkpointing.restore_parameters(checkpoint, self._base)
            if self.step < self.max_steps:
                checkpointing.restore_optimizer(checkpoint, self._optimizer, self._scheduler, self._accelerator.scaler)
        unfinished = self.step < self.max_steps
        order = example_order(examples, settings, self.step) if unfinished else iter(())
        if checkpoint is not None and unfinished:
            checkpointing.restore_rng(checkpoint)  # the last file that can be damaged: nothing was written before
        self._metrics = MetricsFile(self._folder / METRICS_FILE, self.step) if is_main() else None
        if not unfinished:
            return
        if settings.report_to != "none":
            recorded = settings.recorded().items()
            config = {name: v if isinstance(v, (bool, int, float, str)) else str(v) for name, v in recorded}
            self._accelerator.init_trackers("braces", config)
            if checkpoint is not None:
                checkpointing.restore_rng(checkpoint)  # reporters may draw numbers
        self._started = time.perf_counter()
        shared = SharedStop(self._stop, self._device)
        while self.step < self.max_steps and not self.stopped_by:
            self._model.train()
            self._train_step(list(self._batches(order)))
            self._report(f"training{self._shown}", self.step, self.max_steps)
            self.stopped_by = shared.number()
            self._after_step()
        shared.finish()
        late = max(gathered(self._stop.number))
        if late and not self.stopped_by:  # received after the last step
            self.stopped_by = late
            self._save()
        for tracker in self._accelerator.trackers:
            tracker.finish()
        self._check_finite()

    def progress(self) -> checkpointing.Progress:
        """Cumulative counters over all processes. Collective."""
        examples, before = self._data.examples, self._earlier
        mine = (self._tokens, self._computed, float(self._loss_open), float(self._contrast_open))
        tokens, computed, loss, contrast = (sum(numbers) for numbers in zip(*gathered(mine), strict=True))
        return checkpointing.Progress(
            step=self.step,
            max_steps=self.max_steps,
            tokens=int(before.tokens + tokens),
            computed=int(before.computed + computed),
            seconds=before.seconds + time.perf_counter() - self._started,
            loss_sum=self._loss_sum,
            loss_open=loss / world_size(),
            contrast_open=contrast / world_size(),
            logged=self._logged,
            stream=replace(examples.counts) if isinstance(examples, Stream) else None,
        )

    def _batches(self, order: Iterator[Example | None]) -> Iterator[Batch]:
        """This process's batches of the next optimizer step; the batches of other processes are skipped."""
        for _ in range(self._settings.gradient_accumulation):
            for process in range(world_size()):
                rows = list(islice(order, self._settings.batch_size))
                if process == rank():
                    yield collate(rows, self._data.layout, self._data.pad_id, self._data.conditioner)

    def _train_step(self, batches: Sequence[Batch]) -> None:
        """One optimizer step on the mean loss over all scored tokens of all batches of all processes."""
        # `full` rather than a copy from the host, which would wait for the device.
        scored = torch.full((), sum(batch.scored for batch in batches), dtype=torch.float32, device=self._device)
        scored = self._accelerator.reduce(scored, "sum") if world_size() > 1 else scored
        for index, batch in enumerate(batches):
            last = index == len(batches) - 1
            self._accelerator.sync_gradients = last
            with nullcontext() if last else self._accelerator.no_sync(self._model):
                # Gradients are averaged over processes, but the loss is a sum over them.
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
        """Contribution of a block to the loss of its step."""
        settings, conditioner, cuda = self._settings, self._data.conditioner, self._device.type == "cuda"
        block = {
            name: (tensor.pin_memory() if cuda else tensor).to(self._device, non_blocking=cuda)
            for name, tensor in block.items()
        }
        if conditioner is not None:
            # Set until the next block: gradient checkpointing computes the pass again.
            conditioner.apply(block.pop("strengths"))
        labels, owner = block.pop("labels"), block.pop("owner", None)
        terms = {name: block.pop(name) for name in PAIR_TERMS if name in block}
        with only_scored(self._base, block.pop("scored", None)):
            # With a cache, transformers does not check whether positions restart.
            logits = self._model(**block, use_cache=False).logits
        nll = token_nll(logits, labels)
        if owner is None or settings.contrast is None or settings.margin is None:
            return nll.sum() / scored.to(nll.device)
        parts = contrastive_loss(nll, owner, terms, settings.contrast, settings.margin)
        self._contrast_open += (parts[1].detach() / scored.to(nll.device)).to(self._device) * world_size()
        return sum(parts) / scored.to(nll.device)

    def _after_step(self) -> None:
        """Log, evaluate and save if due at this step."""
        settings, last = self._settings, self.step >= self.max_steps
        row: dict[str, Any] = {}
        if last or self.step % settings.logging_steps == 0:
            row = self._figures()
        # After the last step the adapter is evaluated as it was saved.
        if settings.eval_steps and self.step % settings.eval_steps == 0 and not last:
            started = time.perf_counter()
            measured = self._evaluate()
            # Not counted in the time of training.
            spent = time.perf_counter() - started
            self._started += spent
            self._last_log = self._last_log and (self._last_log[0] + spent, self._last_log[1])
            if measured is not None:
                row |= {"eval_loss": measured.loss, "eval_perplexity": measured.perplexity}
        if row:
            if self._metrics is not None:
                self._metrics.add({"step": self.step, "epoch": self.epoch, **row})
            # Reporters group metrics by prefix: `train/loss`, `eval/loss`.
            named = {f"eval/{k[5:]}" if k.startswith("eval_") else f"train/{k}": value for k, value in row.items()}
            self._accelerator.log(named, step=self.step)
        # Also after the last step: the evaluation that follows can be interrupted.
        if self.stopped_by or (settings.save_steps and (last or self.step % settings.save_steps == 0)):
            self._save()

    def _figures(self) -> dict[str, Any]:
        """Mean loss since the last log, rates, gradient norm and speed. Only here are numbers read from the device."""
        now, clock = self.progress(), time.perf_counter()
        loss, contrast = (each / (self.step - self._logged) for each in (now.loss_open, now.contrast_open))
        if not math.isfinite(loss):
            first = self._logged + 1
            when = f"at step {first}" if first == self.step else f"between steps {first} and {self.step}"
            raise self._diverged(f"the loss is not finite {when}")
        self._loss_sum, self._logged = self._loss_sum + now.loss_open, self.step
        self._loss_open.zero_()
        self._contrast_open.zero_()
        before, counted = self._last_log or (self._started, self._earlier.tokens)
        self._last_log = (clock, now.tokens)
        speed = (now.tokens - counted) / max(clock - before, 1e-9)
        self._shown = f": loss {loss:.3f}, {speed:,.0f} tokens/s"
        norm = {} if self._norm is None else {"grad_norm": float(self._norm)}
        lm = {"lm_loss": loss - contrast} if self._data.conditioner and self._settings.contrast else {}
        return {"loss": loss, **lm, **self._rates, **norm, "tokens": now.tokens, "tokens_per_second": speed}

    def _save(self) -> None:
        """Write a checkpoint. Collective; the first process writes."""
        self._check_finite()
        state = checkpointing.capture(self._base, self._optimizer, self._scheduler, self._accelerator.scaler)
        tensors, record = self._adapter.tensors(in_place=False), replace(self._record, progress=self.progress())

        def write(folder: Path) -> None:
            self._write(CHECKPOINT_CARD, tensors, folder)
            checkpointing.write_state(folder, state)
            record.write(folder)

        try:
            if is_main():
                checkpointing.write_checkpoint(self._folder, self.step, self._settings.save_total_limit, write)
        finally:
            barrier()

    def _check_finite(self) -> None:
        if not all(bool(parameter.isfinite().all()) for parameter in checkpointing.trained(self._base).values()):
            raise self._diverged(f"the adapter is not finite at step {self.step}")

    def _diverged(self, what: str) -> BracesError:
        last = checkpointing.newest(self._folder)
        usable = f" {last} was written before and can be used as an adapter." if last else ""
        return BracesError(f"training diverged: {what}", hint=f"Train again with a lower --lr or --gate-lr.{usable}")


def parameter_groups(adapter: Adapter | PeftAdapter, settings: TrainSettings) -> list[dict[str, Any]]:
    """Parameter groups of an optimizer, each with its learning rate and the option that sets it."""
    if isinstance(adapter, PeftAdapter):
        return [{"params": [p for _, p in adapter.named_parameters()], "lr": settings.lr, "name": "lr"}]
    parameters = [each for _, adapter_layer in adapter.adapted_ffns for each in adapter_layer.stored.items()]
    projections = [p for name, p in parameters if name.endswith("projection")]
    gates = [p for name, p in parameters if not name.endswith("projection")]
    groups: list[dict[str, Any]] = [
        {"params": projections, "lr": settings.lr, "name": "lr"},
        {"params": gates, "lr": settings.gate_lr, "name": "gate_lr"},
    ]
    if adapter.mlp is not None:
        groups.append({"params": list(adapter.mlp.parameters()), "lr": settings.lr})
    return groups
