"""transformers.Trainer, taught which parameters are ours and how to show where it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from braces_cli.core.adapter import Adapter
from braces_cli.core.batches import pad_right
from braces_cli.core.models import input_device
from braces_cli.core.progress import Report
from braces_cli.data.examples import Examples
from braces_cli.training.baselines import PeftAdapter
from braces_cli.training.conditions import Conditioner
from braces_cli.training.contrast import contrastive_loss
from braces_cli.training.methods import parameter_groups
from braces_cli.training.settings import TrainSettings


class BracesTrainer(Trainer):
    """A Trainer that optimises an adapter, each part at its own rate, and counts the tokens it has seen."""

    def __init__(
        self,
        adapter: Adapter | PeftAdapter,
        settings: TrainSettings,
        examples: Examples,
        conditioner: Conditioner | None,
        pad_id: int,
        folder: str,
        report: Report,
    ) -> None:
        self._adapter = adapter
        self._settings = settings
        self._conditioner = conditioner
        self._seen: Tensor | int = 0
        model: Any = adapter.model
        with _carrying_adapter(model):
            super().__init__(
                model=model,
                args=_arguments(settings, folder, input_device(model)),
                train_dataset=list(range(len(examples.items))),
                data_collator=lambda rows: _batch(examples, rows, conditioner, pad_id),
                callbacks=[_Progress(report)],
            )
        self.remove_callback(PrinterCallback)  # it prints every log to stdout, which carries the result only

    @property
    def tokens(self) -> int:
        """Tokens trained on so far, padding not counted."""
        return int(self._seen)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            # No weight decay: R does not depend on the length of the rows of its weight.
            self.optimizer = torch.optim.AdamW(parameter_groups(self._adapter, self._settings), weight_decay=0.0)
        return self.optimizer

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        # Summed where the batch lies: no waiting for a GPU in every step.
        self._seen = self._seen + inputs["attention_mask"].sum()
        if self._conditioner is not None:
            # It stays set until the next batch: gradient checkpointing computes the pass once more.
            strengths = inputs.pop("strengths")
            if self._settings.contrast:
                count = kwargs.get("num_items_in_batch")
                weight = self._settings.contrast
                return contrastive_loss(model, inputs, strengths, self._conditioner, weight, count)
            self._conditioner.apply(strengths)
        return super().compute_loss(model, inputs, *args, **kwargs)


def _batch(examples: Examples, rows: Sequence[int], conditioner: Conditioner | None, pad_id: int) -> dict[str, Tensor]:
    batch = pad_right([examples.items[row] for row in rows], pad_id)
    if conditioner is not None:
        batch["strengths"] = conditioner.strengths([examples.conditions[row] for row in rows])
    return batch


@contextmanager
def _carrying_adapter(model: Any) -> Iterator[None]:
    """Trainer refuses a quantised model unless this flag says that it carries an adapter, as ours does."""
    before = model._hf_peft_config_loaded
    model._hf_peft_config_loaded = True
    try:
        yield
    finally:
        model._hf_peft_config_loaded = before


def _arguments(settings: TrainSettings, folder: str, device: torch.device) -> TrainingArguments:
    return TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        learning_rate=settings.lr,
        lr_scheduler_type=settings.schedule if settings.schedule != "constant" else "constant_with_warmup",
        warmup_steps=settings.warmup_steps,
        activation_checkpointing=settings.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False} if settings.gradient_checkpointing else None,
        seed=settings.seed,
        data_seed=settings.seed,
        use_cpu=device.type == "cpu",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_steps=10,
        remove_unused_columns=False,
        dataloader_pin_memory=device.type == "cuda",
    )


class _Progress(TrainerCallback):
    def __init__(self, report: Report) -> None:
        self._report = report
        self._loss = ""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self._loss = f": loss {float(logs['loss']):.3f}"

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._report(f"training{self._loss}", state.global_step, state.max_steps)
