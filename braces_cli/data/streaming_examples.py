"""Examples of sets larger than memory: read, tokenised and shuffled as training goes on."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import count, islice

import torch

from braces_cli.data.examples import Condition, Counts, Example, Reading, check_some, condition, iterate
from braces_cli.data.readers import read_rows

# Examples that wait to be drawn from: all the memory that a stream takes.
BUFFER = 4096
# Examples that are looked at before training starts.
HEAD = 256


class Stream(torch.utils.data.IterableDataset):
    """Endless passes over the rows, each through a shuffle buffer; None fills the last global batch of a pass.

    The order is a function of seed and global batch only. Nothing but the buffer is kept in memory. The shuffle is not
    that of `datasets`: it would pickle the tokenizer to fingerprint the generator, and import datasets for plain files.

    Args:
        names: files or hub sets.
        how: how rows become examples.
        seed: of the shuffling.
        global_batch: examples of an optimizer step, over all processes.

    Attributes:
        counts: of all passes up to now, rows read ahead included.
        passes: passes that have been finished.
        conditions: each attribute that rows name, with the first that does.
        items: tokens of the first examples, in the order of the files.
        chat: some of these are chats.

    Raises:
        DataError: a row cannot be read, here or later, or none has a scored token.
    """

    def __init__(self, names: Sequence[str], how: Reading, seed: int, global_batch: int) -> None:
        self._names, self._how, self._seed, self._global_batch = names, how, seed, global_batch
        self.counts = Counts()
        self.passes = 0
        counts = Counts()
        self.items = [example.tokens for example in islice(self._kept(counts), HEAD) if example.tokens is not None]
        check_some(names, len(self.items), counts.rows)
        self.chat = counts.chat
        self.conditions = self._conditions()

    @property
    def rows(self) -> int:
        return self.counts.rows

    @property
    def truncated(self) -> int:
        return self.counts.truncated

    @property
    def dropped(self) -> int:
        return self.counts.dropped

    def __iter__(self) -> Iterator[Example | None]:
        self.counts, self.passes = Counts(), 0
        for epoch in count():
            yield from self._pass(epoch)
            self.passes += 1

    def _pass(self, epoch: int) -> Iterator[Example | None]:
        draw = random.Random(f"{self._seed} {epoch}")
        buffer: list[Example] = []
        drawn = 0
        for example in self._kept(self.counts):
            drawn += 1
            if len(buffer) < BUFFER:
                buffer.append(example)
                continue
            place = draw.randrange(BUFFER)
            example, buffer[place] = buffer[place], example
            yield example
        check_some(self._names, drawn, self.counts.rows)
        draw.shuffle(buffer)
        yield from buffer
        yield from [None] * (-drawn % self._global_batch)

    def _kept(self, counts: Counts) -> Iterator[Example]:
        for example in iterate(self._names, self._how):
            counts.add(example)
            if example.tokens is not None:
                yield example

    def _conditions(self) -> list[Condition]:
        """One pass over the rows that tokenises nothing: which attributes there are must be known before training."""
        fields = self._how.fields
        if fields is None:
            return []
        named: dict[str | None, Condition] = {}
        for name in self._names:
            for row in read_rows(name, streaming=self._how.streaming):
                found = condition(row, fields)
                named.setdefault(found.attribute, found)
        return list(named.values())
