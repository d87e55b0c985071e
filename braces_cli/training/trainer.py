"""transformers.Trainer, taught which parameters are ours and how to show where it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PrinterCallback, TrainingArguments

from braces_cli.core.adapter import Adapter
from braces_cli.core.batches import pad_right
from braces_cli.core.models import input_device
from braces_cli.data.examples import Examples
from braces_cli.training.conditions import Conditioner
from braces_cli.training.resumable import ResumableTrainer, Surroundings
from braces_cli.training.settings import TrainSettings, Upkeep


class BracesTrainer(ResumableTrainer):
    """A Trainer that optimises gates and projections, each at its own rate, and counts the tokens it has seen."""

    def __init__(
        self,
        adapter: Adapter,
        settings: TrainSettings,
        examples: Examples,
        conditioner: Conditioner | None,
        pad_id: int,
        around: Surroundings,
    ) -> None:
        self._adapter = adapter
        self._settings = settings
        self._conditioner = conditioner
        model: Any = adapter.model
        with _carrying_adapter(model):
            super().__init__(
                around,
                model=model,
                args=_arguments(settings, around.upkeep, str(around.folder), input_device(model)),
                train_dataset=list(range(len(examples.items))),
                data_collator=lambda rows: _batch(examples, rows, conditioner, pad_id),
            )
        self.remove_callback(PrinterCallback)  # it prints every log to stdout, which carries the result only

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            gates = [brace.gate for _, brace in self._adapter.sites]
            weights = [brace.weight for _, brace in self._adapter.sites]
            groups = [
                {"params": weights, "lr": self._settings.lr, "name": "lr"},
                {"params": gates, "lr": self._settings.gate_lr, "name": "gate_lr"},
            ]
            if self._adapter.mlp is not None:
                groups.append({"params": list(self._adapter.mlp.parameters()), "lr": self._settings.lr})
            # No weight decay: R does not depend on the length of the rows of its weight.
            self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        return self.optimizer

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        # Summed where the batch lies: no waiting for a GPU in every step.
        self._seen = self._seen + inputs["attention_mask"].sum()
        if self._conditioner is not None:
            # It stays set until the next batch: gradient checkpointing computes the pass once more.
            self._conditioner.apply(inputs.pop("strengths"))
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


def _arguments(settings: TrainSettings, upkeep: Upkeep, folder: str, device: torch.device) -> TrainingArguments:
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
        save_strategy="no",  # `ResumableTrainer` knows when
        report_to=upkeep.report_to,
        disable_tqdm=True,
        logging_steps=upkeep.logging_steps,
        logging_nan_inf_filter=False,  # it waits for the loss in every step
        # All that learns is used in every pass, and nothing else of the base changes.
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,
        remove_unused_columns=False,
        dataloader_pin_memory=device.type == "cuda",
    )
