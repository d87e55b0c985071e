"""Examples of each optimizer step, and their arrangement in blocks of tokens with little padding.

The order is a function of seed and global batch only, independent of processes, accumulation and packing.

Packed: one block, in which each row contains several examples. Positions restart with each example, from which
transformers derives block-diagonal attention; the rest of a row is padding, as a separate example. With the
contrastive loss, an example with an attribute is in the block twice, the second time at the opposite strength.

    input_ids     a a a b b | c c c c -
    position_ids  0 1 2 0 1 | 0 1 2 3 0

Grouped: blocks of examples of similar length, padded on the right and masked, for models that fail the packing probe.

The first token of an example is never scored: it follows nothing, or another example.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import count, islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.utils import is_flash_attn_2_available

from braces_cli.core.adapter.model import Session
from braces_cli.core.distributed import world_size
from braces_cli.core.errors import ConfigError, logger
from braces_cli.core.models.ffn import parameter_total
from braces_cli.core.models.load import input_device
from braces_cli.core.models.tokenize import IGNORED, Encoded, context_length, pad_right
from braces_cli.data.dataset import Example, Examples, Stream
from braces_cli.training.conditioning import Conditioner
from braces_cli.training.loss import MODEL_FAULTS, can_pick, pair_terms, pick_scored
from braces_cli.training.settings import TrainSettings


def global_batch(settings: TrainSettings) -> int:
    """Examples of an optimizer step, over all processes and accumulated batches."""
    return settings.batch_size * settings.gradient_accumulation * world_size()


def epoch_order(count: int, seed: int, epoch: int, size: int) -> list[int | None]:
    """Indices of an epoch in random order without replacement; None fills the last batch of `size` examples."""
    generator = torch.Generator().manual_seed((seed << 20) + epoch)
    return [*torch.randperm(count, generator=generator).tolist(), *[None] * (-count % size)]


def example_order(examples: Examples | Stream, settings: TrainSettings, done: int = 0) -> Iterator[Example | None]:
    """Endless passes over the examples, after the first `done` optimizer steps; None fills the last batch."""
    size = global_batch(settings)
    if isinstance(examples, Stream):
        stored, order = examples.counts.digest, iter(examples)
        for _ in islice(order, done * size):
            pass
        if done and examples.counts.digest != stored:
            hint = "Give the original rows, or start anew with --overwrite."
            raise ConfigError("the rows of the stream have changed since the run was started", hint=hint)
        yield from order
        return
    length = len(examples.items) + -len(examples.items) % size
    first, skipped = divmod(done * size, length)
    for epoch in count(first):
        indices = epoch_order(len(examples.items), settings.seed, epoch, size)
        for index in indices[skipped if epoch == first else 0 :]:
            yield None if index is None else Example(examples.items[index], examples.conditions[index])


# Largest share of padding in packed rows, if several rows are cheaper than one long row.
MOST_PADDING = 0.05
# Blocks of a grouped batch: more blocks have less padding, and use a device less.
GROUPS = 4

Block = dict[str, Tensor]


@dataclass(frozen=True)
class Layout:
    """Arrangement of examples in blocks.

    Attributes:
        packed: several examples in a row.
        attention: cost of a token per token of its row, over the cost in the linear layers; 0 if attention across
            examples costs nothing, so that one row is best.
        context: maximum tokens of a row, since some models allocate masks of that size. None: no limit.
        groups: blocks of a batch that is not packed.
        only_scored: compute logits of scored tokens only; see `training.loss`.
        contrast: also put examples with an attribute into their block at the opposite strength.
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
        blocks: inputs of the model, `labels`, and if used `strengths`, `scored`, `owner`, `distance` and `share` (see
            `training.loss`).
        tokens: tokens of the examples, without padding.
        scored: tokens that have a loss.
        computed: tokens of the blocks including padding, without those at opposite strengths.
    """

    blocks: list[Block]
    tokens: int
    scored: int
    computed: int


@dataclass(frozen=True)
class TrainingData:
    """Examples, their layout and their condition."""

    examples: Examples | Stream
    layout: Layout
    conditioner: Conditioner | None
    pad_id: int


def collate(
    rows: Sequence[Example | None], layout: Layout, pad_id: int, conditioner: Conditioner | None = None
) -> Batch:
    """Arrange examples in blocks.

    Args:
        rows: None for a missing example.
        conditioner: provides the `strengths` of each block: of its rows or, packed, of its tokens.
    """
    pairs = [(row.tokens, row.condition) for row in rows if row is not None and row.tokens is not None]
    items, conditions = [tokens for tokens, _ in pairs], [condition for _, condition in pairs]
    groups = similar_lengths([len(item.ids) for item in items], min(layout.groups, len(rows)))
    blocks, passed = [], 0
    for members in [list(range(len(items)))] if layout.packed else groups:
        chosen, strengths, owners = [items[index] for index in members], None, None
        terms: dict[str, Tensor] = {}
        if conditioner is not None:
            # (items, attributes); (1, attributes) without items.
            strengths = conditioner.strengths([conditions[index] for index in members] or [None])
        if strengths is not None and layout.contrast:
            terms = pair_terms(chosen, strengths, groups if layout.packed else [range(len(chosen))])
            active = terms["distance"].nonzero().squeeze(1)
            # Row i of n at its strength has the owner i, at the opposite strength n + i.
            owners = torch.cat([torch.arange(len(strengths)), len(strengths) + active])
            strengths = torch.cat([strengths, -strengths[active]])
            chosen = chosen + [chosen[index] for index in active.tolist()]
        passed += sum(len(item.ids) for item in chosen)
        if layout.packed:
            filled = fill_rows([len(item.ids) for item in chosen], layout.attention, layout.context)
            block, example = pack(chosen, filled, pad_id)
            # Padding has the index after the last example: strength 0.
            strengths = None if strengths is None else F.pad(strengths, (0, 0, 0, 1))[example]
            owners = None if owners is None else F.pad(owners, (0, 1))[example]
        else:
            # One padding token for a process without an example in the last batch, which must take part in every pass.
            block = pad_right(chosen or [Encoded([pad_id], [IGNORED])], pad_id)
            block["labels"][:, 0] = IGNORED
            owners = None if owners is None else owners.unsqueeze(1).expand_as(block["labels"])
        found = {"strengths": strengths, "owner": owners, **terms}
        block |= {name: tensor for name, tensor in found.items() if tensor is not None}
        if layout.only_scored:
            pick_scored(block)
        blocks.append(block)
    tokens = sum(len(item.ids) for item in items)
    computed = sum(block["input_ids"].numel() for block in blocks)
    once = round(computed / max(passed / max(tokens, 1), 1))
    return Batch(blocks, tokens, sum(item.scored for item in items), once)


def fill_rows(lengths: Sequence[int], attention: float = 0.0, context: int | None = None) -> list[list[int]]:
    """Indices of the examples in each row, for a cheap pass with at most 5 % padding if possible.

    For each number of rows, examples are added longest first to the emptiest row, with at most `context` tokens; the
    cost is `rows * width * (1 + attention * width)`.
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
    """Block of packed rows, and the index of each token's example, len(items) for padding; all (rows, longest row)."""
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
    """Indices in `groups` groups with the least padding; some may be empty."""
    order = sorted(range(len(lengths)), key=lambda index: lengths[index])

    @cache
    def cut(end: int, parts: int) -> tuple[int, tuple[int, ...]]:
        """Least number of tokens of the first `end` examples in `parts` groups, and the ends of the groups."""
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


# Largest difference of packed and unpacked logits, over the largest logit: rounding in the order of sums.
TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 1e-2}
TOLERANCE_FLOAT32 = 1e-4
# Time of masked attention over that of the same flops in a linear layer (two cores, float32).
MASKED = 4.0
# Tokens of an example in the probe of packing.
PROBE_TOKENS = 512
# Tokens in the probe of scored logits.
PICKED = 8
FLASH = "flash_attention_2"


def choose_layout(session: Session, settings: TrainSettings, items: Sequence[Encoded]) -> Layout:
    """Layout of batches: packed if the probe passes, else grouped by length; logits of scored tokens if possible.

    FlashAttention is turned on if it is installed and passes the probe.

    Args:
        items: training examples, at least one.

    Raises:
        ConfigError: `--packing on`, and the probe found a difference.
    """
    model, tokenizer = session.base.model, session.base.tokenizer
    by_length, pad_id = sorted(items, key=lambda item: len(item.ids)), tokenizer.pad_token_id
    # Examples of median length, the longest and the shortest.
    probe = [list(by_length[index].ids[:PROBE_TOKENS]) for index in (len(by_length) // 2, -1, 0)]
    fault = None
    if settings.packing != "off" and not _try_flash(model, probe, pad_id):
        fault = packing_fault(model, probe, pad_id)
    if fault is not None and settings.packing == "on":
        hint = "Use --packing auto: examples are grouped by length instead."
        raise ConfigError(f"this model cannot be packed: {fault}", where="--packing on", hint=hint)
    if settings.packing == "off" or fault is not None:
        if fault is not None:
            logger.info("examples are not packed but grouped by length: %s", fault)
        # Activations recomputed in the backward pass must find the attributes of their block.
        one = settings.gradient_checkpointing and settings.attribute_field is not None
        layout = Layout(packed=False, groups=1 if one else GROUPS)
    elif _is_flash(model):
        layout = Layout(packed=True)
    else:
        cost = attention_cost(model, len(session.ffns), session.ffns[0].hidden_size)
        layout = Layout(packed=True, attention=cost, context=context_length(model.config, tokenizer))
    tolerance = TOLERANCE.get(next(model.parameters()).dtype, TOLERANCE_FLOAT32)
    only_scored = can_pick(model, probe[1][:PICKED], tolerance)
    return replace(layout, only_scored=only_scored, contrast=bool(settings.contrast))


def attention_cost(model: Any, layers: int, width: int) -> float:
    """Cost of attention between two tokens of a row, over the cost of a token in the linear layers."""
    return MASKED * 4 * layers * width / (2 * parameter_total(model))


def packing_fault(model: Any, probe: Sequence[list[int]], pad_id: int) -> str | None:
    """Difference in the logits of packed examples, None if there is none.

    Each packed example is compared with itself alone, and changed tokens in the first must not change the other logits.
    """
    tolerance = TOLERANCE.get(next(model.parameters()).dtype, TOLERANCE_FLOAT32)
    rows = [[0, 1, 2]] if _is_flash(model) else [[0, 1], [2]]
    first, *rest = probe
    vocabulary = model.get_input_embeddings().weight.shape[0]
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            alone = []
            for ids in probe:
                tokens = torch.tensor([ids], device=input_device(model))
                out = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False)
                alone.append(out.logits[0].float())
            packed = _packed(model, probe, rows, pad_id)
            other = _packed(model, [[(token + 1) % vocabulary for token in first], *rest], rows, pad_id)
    except MODEL_FAULTS as error:
        # A forward pass without positions, or without positions that restart.
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


def _try_flash(model: Any, probe: Sequence[list[int]], pad_id: int) -> bool:
    """Turn on FlashAttention if it is installed, supported and passes the probe."""
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


def _packed(model: Any, probe: Sequence[list[int]], rows: list[list[int]], pad_id: int) -> list[Tensor]:
    """Logits of each example, (tokens, vocabulary)."""
    block, owner = pack([Encoded(ids, ids) for ids in probe], rows, pad_id)
    del block["labels"]
    device = input_device(model)
    logits = model(**{name: tensor.to(device) for name, tensor in block.items()}, use_cache=False).logits
    return [logits[owner.to(logits.device) == index].float() for index in range(len(probe))]


def _relative(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())
