"""What goes into each step: the order of examples, their blocks, and the mean loss over every scored token."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Trainer

from braces_cli.core.models.tokenization import IGNORED
from braces_cli.data.examples import Examples
from braces_cli.data.streaming_examples import Stream
from braces_cli.training.attribute_conditioning import Conditioner
from braces_cli.training.collator import Collator, Layout, computed_tokens
from braces_cli.training.sampler import Order, Rows, SetEpoch
from braces_cli.training.selective_logits import next_tokens, only_scored


class FeedingTrainer(Trainer):
    """Trainer whose steps hold the same examples and give the same loss however they are packed or split.

    Args:
        examples: in memory, or a stream.
        layout: how the examples of a batch lie in blocks.
        conditioner: sets what each block is conditioned on; None: nothing.
        kwargs: for the next class in line.
    """

    def __init__(
        self,
        *,
        examples: Examples | Stream,
        layout: Layout,
        pad_id: int,
        conditioner: Conditioner | None,
        **kwargs: Any,
    ) -> None:
        self._seen: Tensor | int = 0
        self._computed = 0
        self._conditioner = conditioner
        own: dict[str, Any] = {
            "train_dataset": Rows(examples) if isinstance(examples, Examples) else examples,
            "data_collator": Collator(layout, pad_id, conditioner),
            "compute_loss_func": mean_loss,
        }
        super().__init__(**own, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Order:
        args = self.args
        batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        order = Order(len(rows), args.seed, batch)
        self.add_callback(SetEpoch(order))
        return order

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        blocks = inputs["blocks"]
        # Both are known from shapes: no waiting for a GPU.
        self._seen = self._seen + inputs["labels"].numel()
        self._computed += computed_tokens(blocks)
        total: Any = 0.0
        for block in blocks:
            total = total + self.block_loss(model, block, *args, **kwargs)
        return total

    def block_loss(self, model: Any, block: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """What one block adds to the loss of its batch."""
        if self._conditioner is not None:
            # It stays set until the next block: gradient checkpointing computes the pass once more.
            self._conditioner.apply(block.pop("strengths"))
        with only_scored(self.model, block.pop("scored", None)):
            # With a cache, transformers would not look whether positions start anew.
            loss: Any = super().compute_loss(model, {**block, "use_cache": False}, *args, **kwargs)
        return loss


def mean_loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """Cross entropy of the next token, in float32, summed over a block and divided by the scored tokens of the step.

    Args:
        labels: (rows, tokens); or (k,), the next tokens themselves, where there are logits of k scored tokens only.
    """
    logits = outputs.logits if hasattr(outputs, "logits") else outputs[0]
    # Labels are moved rather than logits: no copy of (tokens, vocabulary).
    targets = (labels if labels.ndim == 1 else next_tokens(labels)).to(logits.device)
    flat = logits.reshape(-1, logits.shape[-1]).float()
    summed = F.cross_entropy(flat, targets.reshape(-1), ignore_index=IGNORED, reduction="sum")
    count = (labels != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
    return summed / torch.as_tensor(count, device=summed.device)
