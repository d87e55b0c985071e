"""A transformers.Trainer that writes our checkpoints, goes on from them bit for bit, and stops when asked."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback

from braces_cli.core.utils.distributed import barrier, gathered, is_main, world_size
from braces_cli.core.utils.errors import BracesError
from braces_cli.core.utils.progress import Report, silent
from braces_cli.core.utils.signals import StopRequest
from braces_cli.scoring.likelihood import Likelihood
from braces_cli.training.checkpointing.checkpoint_folders import rotate, write_checkpoint
from braces_cli.training.checkpointing.run_record import Record, read_record
from braces_cli.training.checkpointing.training_state import (
    capture,
    restore_optimizer,
    restore_parameters,
    restore_rng,
    trained,
)
from braces_cli.training.metrics import METRICS_FILE, MetricsFile
from braces_cli.training.settings import Upkeep

logger = logging.getLogger("braces")

STATE_FILE = "trainer_state.json"
DIVERGED = "training diverged: the {} not finite"


@dataclass
class Surroundings:
    """What a trainer works with besides model and rows.

    Attributes:
        folder: of the output.
        record: goes into every checkpoint.
        adapter: gathers the adapter as it is now, in every process; what it returns writes that to a folder.
        evaluate: measures the evaluation rows; None where there are none.
        report: draws progress.
        asked: whether a signal asked to stop.
    """

    folder: Path
    record: Record
    adapter: Callable[[], Callable[[Path], None]]
    evaluate: Callable[[], Likelihood | None]
    upkeep: Upkeep = field(default_factory=Upkeep)
    report: Report = silent
    asked: StopRequest = field(default_factory=StopRequest)


class ResumableTrainer(Trainer):
    """Trainer with checkpoints of safetensors and JSON; see `checkpoint_folders` and `training_state` beside this."""

    def __init__(self, around: Surroundings, **kwargs: Any) -> None:
        self._around = around
        # Tokens that this process has trained on in this call; a tensor where the batches lie, read when logging.
        self._seen: Tensor | int = 0
        # The same with padding, where it is counted.
        self._computed = 0
        self._rates: dict[str, float] = {}
        self._resumed: dict[str, Any] = {}
        self._flow = _Flow(self, around)
        super().__init__(**kwargs)
        self.add_callback(self._flow)

    def run(self, checkpoint: Path | None) -> None:
        """Train to the end, or from `checkpoint` to the end, or until a signal asks to stop.

        Raises:
            BracesError: the loss is not finite, or a checkpoint cannot be written.
            ModelError: the checkpoint is damaged.
        """
        if checkpoint is not None:
            stored = read_record(checkpoint)
            self._resumed = {} if stored is None else stored.progress
        if is_main():
            path = self._around.folder / METRICS_FILE
            self.add_callback(MetricsFile(path, int(self._resumed.get("step", 0))))
        if checkpoint is not None and self._resumed["step"] >= self._resumed["max_steps"]:
            # All steps are done; Trainer would do one more.
            restore_parameters(checkpoint, self.model)
            self.state = type(self.state).load_from_json(str(checkpoint / STATE_FILE))
            self._flow.done = self._resumed
        else:
            self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            late = max(gathered(self._around.asked.number))
            if late and not self.stopped_by:  # asked after the last step
                self._flow.stopped_by = late
                self._save_checkpoint(self.model, None)

    @property
    def done(self) -> dict[str, Any]:
        """After `run`: `step, max_steps, tokens, computed, seconds, loss_sum`, of earlier calls too."""
        return self._flow.done

    @property
    def stopped_by(self) -> int:
        """The signal that ended `run`, 0 where it came to its end."""
        return self._flow.stopped_by

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            if not math.isfinite(logs["loss"]):
                step = self.state.global_step
                raise BracesError(DIVERGED.format(f"loss at step {step} is"), hint="Lower --lr or --gate-lr.")
            logs = self._flow.figures(logs, self._tokens(), self._rates)
        super().log(logs, start_time)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        measured = self._around.evaluate()
        if measured is None:
            return {}
        found = {"eval_loss": measured.loss, "eval_perplexity": measured.perplexity}
        self.log(dict(found))
        return found

    def _tokens(self) -> int:
        """Of all processes and calls; every process must ask."""
        return int(self._resumed.get("tokens", 0)) + sum(gathered(int(self._seen)))

    def _progress(self) -> dict[str, Any]:
        return {
            "step": self.state.global_step,
            "max_steps": self.state.max_steps,
            "tokens": self._tokens(),
            "computed": int(self._resumed.get("computed", 0)) + sum(gathered(self._computed)),
            "seconds": self._flow.seconds(),
            # Of the steps before the last log, and of those since.
            "loss_sum": self._total_loss_scalar,
            "loss_open": sum(gathered(float(self._tr_loss))) / world_size(),
            "logged": self._globalstep_last_logged,
        }

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self.is_deepspeed_enabled:
            logger.warning("no checkpoint of step %d: not under DeepSpeed", self.state.global_step)
            return
        around = self._around
        captured = capture(self.model, self.optimizer, self.lr_scheduler, self._scaler())
        write_adapter, progress = around.adapter(), self._progress()

        def write(folder: Path) -> None:
            write_adapter(folder)
            captured.write(folder)
            self.state.save_to_json(str(folder / STATE_FILE))
            Record(**{**vars(around.record), "progress": progress}).write(folder)

        try:
            if is_main():
                self._flow.flush()
                write_checkpoint(around.folder, self.state.global_step, write)
                rotate(around.folder, around.upkeep.save_total_limit)
        finally:
            barrier()

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        # Before Trainer adds to its sum what has not been logged yet, of this process alone.
        self._flow.done = self._progress()
        return super()._finalize_training(*args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        restore_parameters(Path(resume_from_checkpoint), self.model if model is None else model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            restore_optimizer(Path(checkpoint), self.optimizer, self.lr_scheduler, self._scaler())

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            restore_rng(Path(checkpoint))

    def _scaler(self) -> Any:
        return getattr(self.accelerator, "scaler", None)

    def _restore_counters(self) -> None:
        """Losses go on being summed where the checkpoint left off, so that figures do not tell a resumed run."""
        if self._resumed:
            self._total_loss_scalar = self._resumed["loss_sum"]
            self._tr_loss.fill_(self._resumed["loss_open"])
            self._globalstep_last_logged = self._resumed["logged"]
            self._initial_global_step = 0


class _Flow(TrainerCallback):
    """When to save, to evaluate and to stop, and how fast it goes."""

    def __init__(self, trainer: ResumableTrainer, around: Surroundings) -> None:
        self._trainer = trainer
        self._around = around
        self._started = time.perf_counter()
        self._last: tuple[float, int] | None = None
        self._shown = ""
        # What another process may have been asked, known one step late: no step waits for it.
        self._pending: tuple[Any, Tensor] | None = None
        self.stopped_by = 0
        self.done: dict[str, Any] = {}

    def seconds(self) -> float:
        """Spent in training, in earlier calls too."""
        return float(self._trainer._resumed.get("seconds", 0.0)) + time.perf_counter() - self._started

    def flush(self) -> None:
        """Have every row of metrics written."""
        for callback in self._trainer.callback_handler.callbacks:
            if isinstance(callback, MetricsFile):
                callback.flush()

    def figures(self, logs: dict[str, float], tokens: int, rates: dict[str, float]) -> dict[str, float]:
        """`logs` under our names, with the speed since the last log."""
        now = time.perf_counter()
        before, counted = self._last or (self._started, int(self._trainer._resumed.get("tokens", 0)))
        self._last = (now, tokens)
        speed = (tokens - counted) / max(now - before, 1e-9)
        self._shown = f": loss {logs['loss']:.3f}, {speed:,.0f} tokens/s"
        rest = {name: value for name, value in logs.items() if name != "learning_rate"}
        return {**rest, **rates, "tokens": tokens, "tokens_per_second": speed}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._started = time.perf_counter()
        state.compute_steps(args, state.max_steps)  # or those of the checkpoint would hold
        self._trainer._restore_counters()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        # Before the schedule moves on: the rates of this very step.
        groups = self._trainer.optimizer.param_groups if self._trainer.optimizer else []
        self._trainer._rates = {group["name"]: group["lr"] for group in groups if "name" in group}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        around, step = self._around, state.global_step
        around.report(f"training{self._shown}", step, state.max_steps)
        upkeep, last = around.upkeep, step >= state.max_steps
        # After the last step, too: an evaluation follows, and may be cut off.
        control.should_save = bool(upkeep.save_steps) and (last or step % upkeep.save_steps == 0)
        # After the last step the adapter is measured as it was saved.
        control.should_evaluate = bool(upkeep.eval_steps) and step % upkeep.eval_steps == 0 and not last
        self.stopped_by = self._signal(args.device)
        if self.stopped_by:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._pending is not None:
            self._pending[0].wait()
            self._pending = None

    def _signal(self, device: torch.device) -> int:
        """The signal that asked any process to stop: the same answer in all of them, after the same step."""
        asked = self._around.asked.number
        if world_size() == 1:
            return asked
        from torch.distributed import ReduceOp, all_reduce

        found = 0
        if self._pending is not None:
            work, flag = self._pending
            work.wait()
            found = int(flag)
        flag = torch.tensor(asked, device=device)
        self._pending = (all_reduce(flag, ReduceOp.MAX, async_op=True), flag)
        return found


def finite(model: Any) -> bool:
    """Whether everything that was trained is a number."""
    return all(bool(parameter.isfinite().all()) for parameter in trained(model).values())
