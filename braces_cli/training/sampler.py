"""Which examples each step trains on: a function of seed and global batch only, however they are split or packed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler
from transformers import TrainerCallback

from braces_cli.core.utils.distributed import world_size
from braces_cli.data.examples import Example, Examples
from braces_cli.training.settings import TrainSettings

# Index of no example.
NONE = -1


def global_batch(settings: TrainSettings) -> int:
    """Examples of an optimizer step, over all processes and accumulated batches."""
    return settings.batch_size * settings.gradient_accumulation * world_size()


class Rows(Dataset):
    """Examples in memory by index; `NONE` is None."""

    def __init__(self, examples: Examples) -> None:
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples.items)

    def __getitem__(self, index: int) -> Example | None:
        if index == NONE:
            return None
        conditions = self._examples.conditions
        return Example(self._examples.items[index], conditions[index] if conditions else None)


class Order(Sampler[int]):
    """Indices of an epoch, drawn without replacement; its last global batch is filled up with `NONE`.

    So every process gets as many batches as any other and no example is seen twice in an epoch, whereas accelerate
    would fill up with examples from the front, others for each number of processes.

    Args:
        count: examples.
        seed: of the order; each epoch has one of its own.
        global_batch: examples of an optimizer step, over all processes and accumulated batches.
    """

    def __init__(self, count: int, seed: int, global_batch: int) -> None:
        self._count, self._seed, self._global_batch = count, seed, global_batch
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self._count + -self._count % self._global_batch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed((self._seed << 20) + self.epoch)
        yield from torch.randperm(self._count, generator=generator).tolist()
        yield from [NONE] * (len(self) - self._count)


class SetEpoch(TrainerCallback):
    """Tells the order its epoch, which accelerate's loaders do not pass on where they skip what a resumed run has
    done on several processes."""

    def __init__(self, order: Order) -> None:
        self._order = order

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._order.set_epoch(int(state.epoch or 0))
