"""Logits of the tokens that are scored, and of no others.

A prompt is read, not learnt: the logits behind its tokens take a product with the whole vocabulary and are thrown away.
So the hidden states that enter the head are picked first. What a head and what follows it (a scale, a cap) do to one
token has nothing to do with the others, so the loss and its gradients stay what they are; a probe shows whether that
holds for the model at hand.

Telling opposite strengths apart: each row should be likelier at its own strength s than at -s, by a margin.

    loss = LM(x | s) + weight * softplus(margin |s| + log p(x | -s) - log p(x | s)),  mean over rows with an attribute

The language-modelling loss alone gains little from an attribute, since most tokens of a text would be the same without
it, and leaves it weak: as weak as attributes are in real text, where steering is meant to exaggerate. The margin, in
nats a row and unit of strength, says by how much. Rows at strength 0 have no opposite and pass once; the others twice,
both times in the same block. What the two passes share is what lies before the first adapted FFN's output, one
attention of the model; from there on every hidden state depends on the strength.

The mean is one of each group of rows of similar length, weighted by the group's scored tokens, whether the groups are
blocks of their own or lie packed in one.

How well a model, with or without its adapter, tells the evaluation rows; shared out where there are processes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from braces_cli.core.distributed import gathered, rank, world_size
from braces_cli.core.models.load import input_device
from braces_cli.core.models.tokenize import IGNORED, Encoded
from braces_cli.core.progress import Report
from braces_cli.data.dataset import Examples
from braces_cli.scoring.likelihood import Likelihood, likelihoods
from braces_cli.training.conditioning import Conditioner

logger = logging.getLogger("braces")

# What a forward pass of a model raises that does not take its inputs in this form.
MODEL_FAULTS = (RuntimeError, TypeError, ValueError, AttributeError, LookupError, AssertionError)


def next_tokens(labels: Tensor) -> Tensor:
    """What each token should be followed by, `IGNORED` behind the last one of a row: (rows, tokens) both."""
    return F.pad(labels, (0, 1), value=IGNORED)[:, 1:]


def mean_loss(logits: Tensor, labels: Tensor, count: Tensor | int) -> Tensor:
    """Cross entropy of the next token, in float32, summed over a block and divided by `count`.

    Args:
        labels: (rows, tokens); or (k,), the next tokens themselves, where there are logits of k scored tokens only.
        count: scored tokens of the optimizer step.
    """
    summed = token_nll(logits, labels).sum()
    return summed / torch.as_tensor(count, device=summed.device)


def token_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """-log p of the next tokens in float32, (k,), 0 where none is scored; arguments as of `mean_loss`."""
    # Labels are moved rather than logits: no copy of (tokens, vocabulary).
    targets = (labels if labels.ndim == 1 else next_tokens(labels)).to(logits.device)
    result: Tensor = _TokenNll.apply(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1))
    return result


class _TokenNll(torch.autograd.Function):
    """Cross entropy of each token whose gradient is written over what forward kept.

    `F.cross_entropy` fills two more tensors of (tokens, vocabulary) on its way back, which for a small model is a
    sixth of a step, and for a large vocabulary most of its memory.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        log_chances = logits.log_softmax(-1, dtype=torch.float32)
        ctx.dtype = logits.dtype
        ctx.save_for_backward(log_chances, targets)
        nll = -log_chances.gather(1, targets.clamp(min=0).unsqueeze(1)).squeeze(1)
        return nll.masked_fill_(targets == IGNORED, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, weights: Tensor) -> tuple[Tensor, None]:
        log_chances, targets = ctx.saved_tensors
        weights = weights.masked_fill(targets == IGNORED, 0.0).unsqueeze(1)
        # In place: a second backward pass would find the saved tensor changed, and torch refuses it.
        gradient = log_chances.exp_().mul_(weights)
        gradient.scatter_add_(1, targets.clamp(min=0).unsqueeze(1), -weights)
        return gradient.to(ctx.dtype), None


def pick_scored(block: dict[str, Tensor]) -> None:
    """Give a block `scored`, the k places in rows * tokens where the next token is scored, and `labels`, those tokens.

    `owner`, where a block has it, becomes that of those places. A block that scores nothing, or everything, stays as
    it is.
    """
    targets = next_tokens(block["labels"]).flatten()
    scored = (targets != IGNORED).nonzero().squeeze(1)
    if 0 < len(scored) < len(targets):
        block["scored"], block["labels"] = scored, targets[scored]
        if "owner" in block:
            block["owner"] = block["owner"].flatten()[scored]


@contextmanager
def only_scored(model: Any, scored: Tensor | None) -> Iterator[None]:
    """Inside, the logits of `model` are (1, k, vocabulary), those of places `scored` (k,); None: all of them."""
    if scored is None:
        yield
        return

    def pick(head: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = args[0].flatten(0, 1)
        return hidden[scored.to(hidden.device)].unsqueeze(0), *args[1:]

    handle = model.get_output_embeddings().register_forward_pre_hook(pick)
    try:
        yield
    finally:
        handle.remove()


def can_pick(model: Any, ids: Sequence[int], tolerance: float) -> bool:
    """Whether logits of picked tokens are those that the model gives them among all.

    Args:
        ids: any few tokens.
        tolerance: for the largest difference, over the largest logit.
    """
    rows = torch.tensor([list(ids), list(ids)[::-1]], device=input_device(model))
    scored = torch.tensor([0, rows.numel() - 1], device=rows.device)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            whole = model(input_ids=rows, use_cache=False).logits.float()
            with only_scored(model, scored):
                picked = model(input_ids=rows, use_cache=False).logits.float()
    except MODEL_FAULTS as error:
        # A head that is called in a way of its own, or a model without one.
        logger.debug("logits of all tokens are computed: %s", error)
        return False
    finally:
        model.train(was_training)
    expected = whole.flatten(0, 1)[scored.to(whole.device)]
    if picked.shape != (1, *expected.shape):
        return False
    return bool((picked[0] - expected).abs().max() <= tolerance * whole.abs().max())


# Keys of `pair_terms`.
PAIR_TERMS: tuple[str, ...] = ("distance", "share")


def pair_terms(items: Sequence[Encoded], strengths: Tensor, groups: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """What the contrastive term of each of n rows needs, both (n,).

    `distance` is |s|, summed over attributes; `share` the weight of the row's term in scored tokens, 0 at strength 0.

    Args:
        strengths: (n, attributes).
        groups: indices of the rows of each group.
    """
    distance = strengths.abs().sum(dim=1)
    share = torch.zeros_like(distance)
    for group in groups:
        active = [row for row in group if distance[row]]
        share[active] = sum(items[row].scored for row in group) / max(len(active), 1)
    return {"distance": distance, "share": share}


def contrastive_loss(
    nll: Tensor, owner: Tensor, terms: dict[str, Tensor], weight: float, margin: float, count: Tensor | int
) -> Tensor:
    """The loss of one block.

    Args:
        nll: -log p of each token, (k,), 0 where none is scored.
        owner: of each of them the row i that it belongs to at its own strength, or n + i at the opposite one, (k,).
        terms: of `pair_terms`.
        margin: in nats, for s = 1.
        count: scored tokens of all blocks of an optimizer step, opposite strengths left out.
    """
    terms = {name: tensor.to(nll.device) for name, tensor in terms.items()}
    rows = len(terms["share"])
    # A product rather than an addition at indices: on a GPU that would add up in any order.
    belongs = owner.to(nll.device).flatten() == torch.arange(2 * rows, device=nll.device).unsqueeze(1)
    own, opposite = (belongs.to(nll.dtype) @ nll).split(rows)
    pairs = terms["share"] * F.softplus(margin * terms["distance"] + own - opposite)
    return (own.sum() + weight * pairs.sum()) / torch.as_tensor(count, device=nll.device)


def measure(
    model: Any,
    examples: Examples | None,
    conditioner: Conditioner | None,
    pad_id: int,
    batch_size: int,
    report: Report,
    stage: str,
) -> Likelihood | None:
    """Likelihood of all examples together, each on its own condition, every token counting the same."""
    if examples is None:
        return None
    mine, count = _share([len(item.ids) for item in examples.items])
    rows = examples.conditions

    def condition(batch: Sequence[int]) -> None:
        if conditioner is not None:
            with torch.no_grad():
                conditioner.apply(conditioner.strengths([rows[mine[row]] for row in batch]))

    try:
        items = [examples.items[row] for row in mine]
        found = likelihoods(model, items, pad_id, batch_size, report, stage, condition)
    finally:
        if conditioner is not None:
            conditioner.clear()
    return sum(gathered(sum(found[:count], Likelihood())), Likelihood())


def _share(lengths: Sequence[int]) -> tuple[list[int], int]:
    """Rows of this process, and how many of them count.

    Every process gets as many, the last of which may be a repetition: where a model is spread over processes, all must
    call it equally often.
    """
    if world_size() == 1:
        return list(range(len(lengths))), len(lengths)
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    mine = order[rank() :: world_size()]
    share = -(-len(lengths) // world_size())
    return mine + order[: share - len(mine)], len(mine)
