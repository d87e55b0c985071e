"""Which examples each step trains on: a function of seed and global batch only, however they are split or packed."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count, islice

import torch
from torch.utils.data import Sampler

from braces_cli.core.utils.distributed import world_size
from braces_cli.data.examples import Example, Examples
from braces_cli.data.streaming_examples import Stream
from braces_cli.training.settings import TrainSettings

# Index of no example.
NONE = -1


def global_batch(settings: TrainSettings) -> int:
    """Examples of an optimizer step, over all processes and accumulated batches."""
    return settings.batch_size * settings.gradient_accumulation * world_size()


class EpochSampler(Sampler[int]):
    """Indices of an epoch, drawn without replacement; its last global batch is filled up with `NONE`.

    Every process gets the same number of batches and no example is seen twice in an epoch.

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


def steps_per_epoch(examples: Examples | Stream, settings: TrainSettings) -> int | None:
    """Optimizer steps of a pass; None for a stream, whose length is not known."""
    return -(-len(examples.items) // global_batch(settings)) if isinstance(examples, Examples) else None


def example_order(examples: Examples | Stream, settings: TrainSettings, done: int = 0) -> Iterator[Example | None]:
    """Endless passes over the examples, from behind the first `done` optimizer steps; None is no example."""
    size = global_batch(settings)
    if isinstance(examples, Stream):
        yield from islice(examples, done * size, None)
        return
    sampler = EpochSampler(len(examples.items), settings.seed, size)
    first, skipped = divmod(done * size, len(sampler))
    for epoch in count(first):
        sampler.set_epoch(epoch)
        for index in islice(sampler, skipped if epoch == first else 0, None):
            yield None if index == NONE else examples[index]
