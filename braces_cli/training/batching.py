"""Which examples each step trains on: a function of seed and global batch only, however they are split or packed.

Examples of one batch -> blocks of tokens for the model, with as little padding as can be.

Packed: one block, in which every row holds several examples one after the other. Positions start anew with each, by
which transformers keeps attention inside an example (block-diagonal for SDPA, variable-length for FlashAttention). What
is left of a row is an example of padding of its own. Where strengths are contrasted, an example with an attribute lies
in the block twice, the second time at the opposite strength.

    input_ids     a a a b b | c c c c -
    position_ids  0 1 2 0 1 | 0 1 2 3 0

Grouped: blocks of examples of similar length, each padded behind and masked, for models that cannot be packed.

The first token of an example is never scored: before it stands nothing, or another example.

Whether the very model at hand can be packed: a probe at the start of a run, and the layout that follows from it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import count, islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Sampler
from transformers.utils import is_flash_attn_2_available

from braces_cli.core.adapter.model import Session
from braces_cli.core.distributed import world_size
from braces_cli.core.errors import ConfigError
from braces_cli.core.models.ffn import parameter_total
from braces_cli.core.models.load import input_device
from braces_cli.core.models.tokenize import IGNORED, Encoded, context_length, pad_right
from braces_cli.data.dataset import Example, Examples, Stream
from braces_cli.training.conditioning import Conditioner
from braces_cli.training.loss import MODEL_FAULTS, can_pick, pair_terms, pick_scored
from braces_cli.training.settings import TrainSettings

logger = logging.getLogger("braces")

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
        only_scored: logits are computed of scored tokens only; see `training.loss`.
        contrast: examples with an attribute also lie in their block at the opposite strength; see
            `training.loss`.
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
            strengths `owner`, `distance` and `share` (see `training.loss`).
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
    for blocks in range(1, len(lengths) + 1):
        rows: list[list[int]] = [[] for _ in range(blocks)]
        filled = [0] * blocks
        for index in order:
            row = filled.index(min(filled))
            rows[row].append(index)
            filled[row] += lengths[index]
        width = max(filled)
        if context is not None and width > context and blocks < len(lengths):
            continue
        padding = max(1 - sum(filled) / (blocks * width) - MOST_PADDING, 0.0)
        cost = (padding, blocks * width * (1 + attention * width))
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


# What packed and unpacked logits may differ by, over the largest logit: rounding in the order of sums.
TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 1e-2}
TOLERANCE_FLOAT32 = 1e-4
# A masked score of attention takes so many times as long as the same flops in a linear layer (two cores, float32).
MASKED = 4.0
# Tokens of an example that the probe looks at.
PROBE_TOKENS = 512
# Tokens a row of the probe whether logits can be picked.
PICKED = 8
FLASH = "flash_attention_2"


def choose_layout(session: Session, settings: TrainSettings, items: Sequence[Encoded]) -> Layout:
    """How the examples of a batch lie in blocks, and whether logits are computed of scored tokens only.

    Raises:
        ConfigError: packing is asked for, and the probe found a difference.
    """
    layout, model = _blocks(session, settings, items), session.base.model
    picks = can_pick(model, probe_items(items)[1][:PICKED], _tolerance(model))
    return replace(layout, only_scored=picks, contrast=bool(settings.contrast))


def _blocks(session: Session, settings: TrainSettings, items: Sequence[Encoded]) -> Layout:
    """Packed where the probe allows it, else grouped by length; FlashAttention is turned on where it is installed.

    Args:
        settings: of these `packing`: `on` makes it an error that the model cannot be packed, `off` asks for groups.
        items: examples as they will be trained on, at least one.

    Raises:
        ConfigError: `on`, and the probe found a difference.
    """
    # Activations computed again in the backward pass must find the attributes of their own block still set.
    one = settings.gradient_checkpointing and settings.attribute_field is not None
    grouped = Layout(packed=False, groups=1 if one else GROUPS)
    if settings.packing == "off":
        return grouped
    model = session.base.model
    pad_id = session.base.tokenizer.pad_token_id
    probe = probe_items(items)
    if _try_flash(model, probe, pad_id):
        return Layout(packed=True)
    fault = packing_fault(model, probe, pad_id)
    if fault is None:
        cost = attention_cost(model, len(session.ffns), session.ffns[0].hidden_size)
        if _is_flash(model):
            return Layout(packed=True)
        return Layout(packed=True, attention=cost, context=context_length(model.config, session.base.tokenizer))
    if settings.packing == "on":
        hint = "Use --packing auto: examples are grouped by length instead."
        raise ConfigError(f"this model cannot be packed: {fault}", where="--packing on", hint=hint)
    logger.info("examples are not packed but grouped by length: %s", fault)
    return grouped


def attention_cost(model: Any, layers: int, width: int) -> float:
    """What each token of a row adds to the cost of another, over what a token costs in the linear layers."""
    return MASKED * 4 * layers * width / (2 * parameter_total(model))


def probe_items(items: Sequence[Encoded]) -> list[list[int]]:
    """Tokens of three examples: a middling one, the longest and the shortest, or the same again where there are few."""
    order = sorted(items, key=lambda item: len(item.ids))
    return [list(order[place].ids[:PROBE_TOKENS]) for place in (len(order) // 2, -1, 0)]


def packing_fault(model: Any, probe: Sequence[list[int]], pad_id: int) -> str | None:
    """What is wrong with the logits of packed examples, None where nothing is.

    Each example packed is held to itself alone; and other tokens in the first may not move the logits of the rest.
    """
    tolerance = _tolerance(model)
    rows = [[0, 1, 2]] if _is_flash(model) else [[0, 1], [2]]
    first, *rest = probe
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            alone = [_alone(model, ids) for ids in probe]
            packed = _packed(model, probe, rows, pad_id)
            other = _packed(model, [[(token + 1) % _vocabulary(model) for token in first], *rest], rows, pad_id)
    except MODEL_FAULTS as error:
        # A forward pass that takes no positions, or none that start anew.
        return (str(error).strip() or type(error).__name__).splitlines()[0][:120]
    finally:
        model.train(was_training)
    apart = max(map(_relative, packed, alone))
    if not apart <= tolerance:
        return f"packed logits differ by {apart:.1e} from those of the same examples alone"
    leak = max(map(_relative, other[1:], packed[1:]))
    if not leak <= tolerance / 3:
        return f"an example moves the logits of the next one by {leak:.1e}"
    return None


def _tolerance(model: Any) -> float:
    return TOLERANCE.get(next(model.parameters()).dtype, TOLERANCE_FLOAT32)


def _try_flash(model: Any, probe: Sequence[list[int]], pad_id: int) -> bool:
    """Turn FlashAttention on where it is installed, fits and passes the probe."""
    half = next(model.parameters()).dtype in TOLERANCE
    if not (half and input_device(model).type == "cuda" and is_flash_attn_2_available()) or _is_flash(model):
        return False
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation(FLASH)
        fault = packing_fault(model, probe, pad_id)
    except (ValueError, ImportError, RuntimeError) as error:
        fault = str(error).splitlines()[0]
    if fault is None:
        return True
    model.set_attn_implementation(before)
    logger.info("FlashAttention is not used: %s", fault)
    return False


def _is_flash(model: Any) -> bool:
    return str(model.config._attn_implementation).startswith("flash")


def _vocabulary(model: Any) -> int:
    return int(model.get_input_embeddings().weight.shape[0])


def _alone(model: Any, ids: list[int]) -> Tensor:
    tokens = torch.tensor([ids], device=input_device(model))
    logits: Tensor = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False).logits[0]
    return logits.float()


def _packed(model: Any, probe: Sequence[list[int]], rows: list[list[int]], pad_id: int) -> list[Tensor]:
    """Logits of each example, (tokens, vocabulary)."""
    block, owner = pack([Encoded(ids, ids, False, False) for ids in probe], rows, pad_id)
    del block["labels"]
    device = input_device(model)
    logits = model(**{name: tensor.to(device) for name, tensor in block.items()}, use_cache=False).logits
    return [logits[owner.to(logits.device) == index].float() for index in range(len(probe))]


def _relative(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())
