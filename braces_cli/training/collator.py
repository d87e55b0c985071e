"""Examples of one batch -> blocks of tokens for the model, with as little padding as can be.

Packed: one block, in which every row holds several examples one after the other. Positions start anew with each, by
which transformers keeps attention inside an example (block-diagonal for SDPA, variable-length for FlashAttention). What
is left of a row is an example of padding of its own.

    input_ids     a a a b b | c c c c -
    position_ids  0 1 2 0 1 | 0 1 2 3 0

Grouped: blocks of examples of similar length, each padded behind and masked, for models that cannot be packed.

The first token of an example is never scored: before it stands nothing, or another example.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from braces_cli.core.models.padding import pad_right
from braces_cli.core.models.tokenization import IGNORED, Encoded
from braces_cli.data.examples import Example, Examples
from braces_cli.data.streaming_examples import Stream
from braces_cli.training.attribute_conditioning import Conditioner
from braces_cli.training.selective_logits import pick_scored

# Padding that rows of a packed block may have where several rows are cheaper than one long one.
MOST_PADDING = 0.05
# Blocks of a batch that is grouped: more of them pad less, and keep a device less busy.
GROUPS = 4

Block = dict[str, Tensor]


@dataclass(frozen=True)
class Layout:
    """How examples lie in blocks.

    Attributes:
        packed: several examples a row.
        attention: what a token of a row costs more for each token that the row is long, over what it costs anyway.
            0 where attention costs nothing across examples, so that one row is best.
        context: tokens that a row may hold: some models keep masks of no other size. None: any number.
        groups: blocks of a batch that is not packed.
        only_scored: logits are computed of scored tokens only; see `training.selective_logits`.
    """

    packed: bool
    attention: float = 0.0
    context: int | None = None
    groups: int = GROUPS
    only_scored: bool = False


@dataclass(frozen=True)
class Batch:
    """The examples of one forward and backward pass.

    Attributes:
        blocks: inputs of the model, `labels`, and `strengths` and `scored` where they are used.
        tokens: of the examples, without padding.
        scored: tokens that have a loss.
        computed: tokens of the blocks, padding included.
    """

    blocks: list[Block]
    tokens: int
    scored: int
    computed: int


@dataclass(frozen=True)
class TrainingData:
    """What the steps are fed with: the examples, how they lie in blocks, and what they are conditioned on."""

    examples: Examples | Stream
    layout: Layout
    conditioner: Conditioner | None
    pad_id: int


class Collator:
    """Turns examples into a `Batch`.

    Args:
        conditioner: gives each block the `strengths` of its rows or, packed, of its tokens; None: there are none.
    """

    def __init__(self, layout: Layout, pad_id: int, conditioner: Conditioner | None = None) -> None:
        self._layout, self._pad_id, self._conditioner = layout, pad_id, conditioner

    def __call__(self, rows: Sequence[Example | None]) -> Batch:
        kept = [row for row in rows if row is not None]
        items = [row.tokens for row in kept if row.tokens is not None]
        if self._layout.packed:
            blocks = [self._packed(kept, items)]
        else:
            blocks = self._grouped(kept, items, min(self._layout.groups, len(rows)))
        if self._layout.only_scored:
            for block in blocks:
                pick_scored(block)
        # The first token of an example is never scored.
        scored = sum(len(item.labels) - 1 - item.labels[1:].count(IGNORED) for item in items)
        return Batch(blocks, sum(len(item.ids) for item in items), scored, computed_tokens(blocks))

    def _packed(self, kept: Sequence[Example], items: Sequence[Encoded]) -> Block:
        rows = fill_rows([len(item.ids) for item in items], self._layout.attention, self._layout.context)
        block, owner = pack(items, rows, self._pad_id)
        if self._conditioner is not None:
            strengths = self._strengths(kept)
            # Padding belongs to no example, and takes the zeros behind the last.
            block["strengths"] = torch.cat([strengths, torch.zeros_like(strengths[:1])])[owner]
        return block

    def _grouped(self, kept: Sequence[Example], items: Sequence[Encoded], groups: int) -> list[Block]:
        blocks = []
        for chosen in similar_lengths([len(item.ids) for item in items], groups):
            block = pad_right([items[index] for index in chosen], self._pad_id) if chosen else _nothing(self._pad_id)
            block["labels"][:, 0] = IGNORED
            if self._conditioner is not None:
                strengths = self._strengths([kept[index] for index in chosen])
                block["strengths"] = strengths[: max(len(chosen), 1)]
            blocks.append(block)
        return blocks

    def _strengths(self, rows: Sequence[Example]) -> Tensor:
        """(rows, attributes), and one row of zeros where there are no rows."""
        assert self._conditioner is not None
        return self._conditioner.strengths([row.condition for row in rows] or [None])


def _nothing(pad_id: int) -> Block:
    """A block of one padding token, for a process that has no example in the last batch but must take part."""
    token = torch.full((1, 1), pad_id)
    return {"input_ids": token, "attention_mask": torch.ones_like(token), "labels": torch.full((1, 1), IGNORED)}


def fill_rows(lengths: Sequence[int], attention: float = 0.0, context: int | None = None) -> list[list[int]]:
    """Indices of the examples in each row, so that a pass over the rows is cheap and at most 5 % of it is padding.

    Of every number of rows, examples go longest first to the emptiest row; cost: `rows * width * (1 + attention *
    width)`. Where rows of at most `context` tokens cannot be filled so well, they are filled as well as can be.
    """
    best: list[list[int]] = [[]]
    least = (float("inf"), 0.0)
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    for count in range(1, len(lengths) + 1):
        rows: list[list[int]] = [[] for _ in range(count)]
        filled = [0] * count
        for index in order:
            row = filled.index(min(filled))
            rows[row].append(index)
            filled[row] += lengths[index]
        width = max(filled)
        if context is not None and width > context and count < len(lengths):
            continue
        padding = max(1 - sum(filled) / (count * width) - MOST_PADDING, 0.0)
        cost = (padding, count * width * (1 + attention * width))
        if cost < least:
            best, least = rows, cost
    return best


def pack(items: Sequence[Encoded], rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Block, Tensor]:
    """`input_ids`, `position_ids` and `labels` of packed rows; and each token's example, the number of examples for
    padding. All (rows, longest row)."""
    width = max(1, max(sum(len(items[index].ids) for index in row) for row in rows))
    shape = (len(rows), width)
    ids, labels = torch.full(shape, pad_id), torch.full(shape, IGNORED)
    positions, owner = torch.zeros(shape, dtype=torch.long), torch.full(shape, len(items))
    for number, row in enumerate(rows):
        start = 0
        for index in row:
            item = items[index]
            end = start + len(item.ids)
            ids[number, start:end] = torch.tensor(item.ids)
            labels[number, start + 1 : end] = torch.tensor(item.labels[1:])
            positions[number, start:end] = torch.arange(end - start)
            owner[number, start:end] = index
            start = end
        positions[number, start:] = torch.arange(width - start)
    return {"input_ids": ids, "position_ids": positions, "labels": labels}, owner


def similar_lengths(lengths: Sequence[int], groups: int) -> list[list[int]]:
    """Indices in `groups` groups that pad least when each is padded to its longest; some may be empty."""
    order = sorted(range(len(lengths)), key=lambda index: lengths[index])

    @cache
    def cut(end: int, parts: int) -> tuple[int, tuple[int, ...]]:
        """Least tokens of the first `end` examples in `parts` groups, and where the groups end."""
        if end == 0 or parts == 1:
            return (end * lengths[order[end - 1]] if end else 0), (end,) * parts
        options = []
        for start in range(end + 1):
            tokens, ends = cut(start, parts - 1)
            own = (end - start) * lengths[order[end - 1]] if start < end else 0
            options.append((tokens + own, (*ends, end)))
        return min(options)

    ends = cut(len(order), groups)[1]
    return [order[start:end] for start, end in zip((0, *ends), ends, strict=False)]


def computed_tokens(blocks: Sequence[Block]) -> int:
    """Tokens that a pass over the blocks computes, padding included."""
    return sum(block["input_ids"].numel() for block in blocks)
