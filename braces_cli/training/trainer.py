"""transformers.Trainer, taught which parameters are ours and how to show where it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PrinterCallback, TrainingArguments

from braces_cli.core.method.adapter import Adapter
from braces_cli.core.models.loading import input_device
from braces_cli.data.examples import Examples
from braces_cli.data.streaming_examples import Stream
from braces_cli.training.adapter_setup import parameter_groups
from braces_cli.training.attribute_conditioning import Conditioner
from braces_cli.training.checkpointing.resumable_trainer import ResumableTrainer, Surroundings
from braces_cli.training.collator import Layout
from braces_cli.training.contrastive_loss import contrastive_loss
from braces_cli.training.feeding import FeedingTrainer
from braces_cli.training.peft_baselines import PeftAdapter
from braces_cli.training.settings import TrainSettings, Upkeep


class BracesTrainer(FeedingTrainer, ResumableTrainer):
    """A Trainer that optimises an adapter, each part at its own rate.

    What goes into a step is `FeedingTrainer`'s, checkpoints and figures are `ResumableTrainer`'s.
    """

    def __init__(
        self,
        adapter: Adapter | PeftAdapter,
        settings: TrainSettings,
        examples: Examples | Stream,
        layout: Layout,
        conditioner: Conditioner | None,
        pad_id: int,
        around: Surroundings,
    ) -> None:
        self._adapter = adapter
        self._settings = settings
        model: Any = adapter.model
        with _carrying_adapter(model):
            super().__init__(
                around=around,
                model=model,
                args=_arguments(settings, around.upkeep, str(around.folder), input_device(model)),
                examples=examples,
                layout=layout,
                pad_id=pad_id,
                conditioner=conditioner,
            )
        # Who recomputes or shards has no memory to spare.
        if isinstance(adapter, Adapter) and (settings.gradient_checkpointing or self.is_fsdp_enabled):
            adapter.save_memory()
        self.remove_callback(PrinterCallback)  # it prints every log to stdout, which carries the result only

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            # No weight decay: R does not depend on the length of the rows of its weight.
            self.optimizer = torch.optim.AdamW(parameter_groups(self._adapter, self._settings), weight_decay=0.0)
        return self.optimizer

    def block_loss(self, model: Any, block: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        weight, margin = self._settings.contrast, self._settings.margin
        if not weight or margin is None or self._conditioner is None:
            return super().block_loss(model, block, *args, **kwargs)
        count, strengths = kwargs.get("num_items_in_batch"), block.pop("strengths")
        loss = contrastive_loss(model, block, strengths, self._conditioner, weight, margin, count)
        # As Trainer does where the tokens of all processes are counted: their gradients are averaged.
        return loss if count is None else loss * self.accelerator.num_processes


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
    assert settings.lr is not None  # by `TrainSettings.at_width`
    arguments = TrainingArguments(
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
        # Each process reads a stream itself: blocks cannot be cut up and sent to others.
        accelerator_config={"dispatch_batches": False},
        dataloader_pin_memory=device.type == "cuda",
    )
    # A process uses one GPU: Trainer would take all that it sees, and as many times the batch.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments
