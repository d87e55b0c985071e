"""Examples of one batch -> blocks of tokens for the model, with as little padding as can be.

Packed: one block, in which every row holds several examples one after the other. Positions start anew with each, by
which transformers keeps attention inside an example (block-diagonal for SDPA, variable-length for FlashAttention). What
is left of a row is an example of padding of its own. Where strengths are contrasted, an example with an attribute lies
in the block twice, the second time at the opposite strength.

    input_ids     a a a b b | c c c c -
    position_ids  0 1 2 0 1 | 0 1 2 3 0

Grouped: blocks of examples of similar length, each padded behind and masked, for models that cannot be packed.

The first token of an example is never scored: before it stands nothing, or another example.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from braces_cli.core.models.padding import pad_right
from braces_cli.core.models.tokenization import IGNORED, Encoded
from braces_cli.data.examples import Example, Examples
from braces_cli.data.streaming_examples import Stream
from braces_cli.training.attribute_conditioning import Conditioner
from braces_cli.training.contrastive_loss import pair_terms
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
        contrast: examples with an attribute also lie in their block at the opposite strength; see
            `training.contrastive_loss`.
    """

    packed: bool
    attention: float = 0.0
    context: int | None = None
    groups: int = GROUPS
    only_scored: bool = False
    contrast: bool = False


@dataclass(frozen=True)
class Batch:
    """The examples of one forward and backward pass.

    Attributes:
        blocks: inputs of the model, `labels`, and where they are used `strengths`, `scored`, and of contrasted
            strengths `owner`, `distance` and `share` (see `training.contrastive_loss`).
        tokens: of the examples, without padding.
        scored: tokens that have a loss.
        computed: tokens of the blocks, padding included; of contrasted strengths those at an example's own strength.
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
        groups = similar_lengths([len(item.ids) for item in items], min(self._layout.groups, len(rows)))
        if self._layout.packed:
            sides = [self._sides(kept, groups)]
            blocks = [self._packed(side) for side in sides]
        else:
            sides = [self._sides([kept[index] for index in chosen]) for chosen in groups]
            blocks = [self._padded(side) for side in sides]
        if self._layout.only_scored:
            for block in blocks:
                pick_scored(block)
        tokens, computed = sum(len(item.ids) for item in items), computed_tokens(blocks)
        twice = sum(len(item.ids) for side in sides for item in side.items) / max(tokens, 1)
        return Batch(blocks, tokens, sum(item.scored for item in items), round(computed / max(twice, 1)))

    def _sides(self, kept: Sequence[Example], groups: Sequence[Sequence[int]] | None = None) -> _Sides:
        """The examples of a block, those with an attribute a second time at the opposite strength where it is asked.

        Args:
            groups: of similar length; None: all are one.
        """
        items = [row.tokens for row in kept if row.tokens is not None]
        if self._conditioner is None:
            return _Sides(items)
        strengths = self._conditioner.strengths([row.condition for row in kept] or [None])
        if not self._layout.contrast:
            return _Sides(items, strengths)
        terms = pair_terms(items, strengths, [range(len(items))] if groups is None else groups)
        active = terms["distance"].nonzero().squeeze(1)
        owners = torch.cat([torch.arange(len(strengths)), len(strengths) + active])
        both = items + [items[index] for index in active.tolist()]
        return _Sides(both, torch.cat([strengths, -strengths[active]]), owners, terms)

    def _packed(self, sides: _Sides) -> Block:
        rows = fill_rows([len(item.ids) for item in sides.items], self._layout.attention, self._layout.context)
        block, example = pack(sides.items, rows, self._pad_id)
        if sides.strengths is not None:
            # Padding belongs to no example, and takes the zeros behind the last.
            block["strengths"] = torch.cat([sides.strengths, torch.zeros_like(sides.strengths[:1])])[example]
        if sides.owners is not None:
            block["owner"] = F.pad(sides.owners, (0, 1))[example]
        return block | sides.terms

    def _padded(self, sides: _Sides) -> Block:
        block = pad_right(sides.items, self._pad_id) if sides.items else _nothing(self._pad_id)
        block["labels"][:, 0] = IGNORED
        if sides.strengths is not None:
            block["strengths"] = sides.strengths
        if sides.owners is not None:
            block["owner"] = sides.owners.unsqueeze(1).expand_as(block["labels"])
        return block | sides.terms


@dataclass(frozen=True)
class _Sides:
    """What lies in one block: examples, their strengths, and which of them are the same at opposite strengths.

    Attributes:
        strengths: (items, attributes); (1, attributes) where there are no items.
        owners: of n examples i, of the one that is i at the opposite strength n + i; (items,).
        terms: of `pair_terms`.
    """

    items: list[Encoded]
    strengths: Tensor | None = None
    owners: Tensor | None = None
    terms: dict[str, Tensor] = field(default_factory=dict)


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
