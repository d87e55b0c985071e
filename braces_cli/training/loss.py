"""Losses of training, and the likelihood of the evaluation rows.

Logits are computed for scored tokens only: a pre-hook of the LM head selects their hidden states, and a probe on the
model at hand verifies that the logits are unchanged.

The contrastive loss raises each row's likelihood at its own strength s over that at -s by a margin:

    loss = LM(x | s) + weight * softplus(margin |s| + log p(x | -s) - log p(x | s)),  mean over rows with an attribute

The mean is taken in each group of rows of similar length and weighted by the group's scored tokens, whether the groups
are separate blocks or packed in one. Rows at strength 0 pass once; the others twice, in the same block.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from braces_cli.core.distributed import gathered, rank, world_size
from braces_cli.core.errors import logger
from braces_cli.core.models.load import input_device
from braces_cli.core.models.structure import only_scored
from braces_cli.core.models.tokenize import IGNORED, Encoded
from braces_cli.core.progress import Report
from braces_cli.data.dataset import Examples
from braces_cli.scoring.likelihood import Likelihood, likelihoods
from braces_cli.training.conditioning import Conditioner

# Raised by the forward pass of a model that does not accept inputs of this form.
MODEL_FAULTS = (RuntimeError, TypeError, ValueError, AttributeError, LookupError, AssertionError)


def token_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """-log p of the next token in float32, (k,), 0 for tokens that are not scored.

    Args:
        labels: (rows, tokens); or (k,), the targets, if there are logits of k scored tokens only.
    """
    # Labels are moved rather than logits: no copy of (tokens, vocabulary).
    targets = (labels if labels.ndim == 1 else F.pad(labels, (0, 1), value=IGNORED)[:, 1:]).to(logits.device)
    result: Tensor = _TokenNll.apply(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1))
    return result


class _TokenNll(torch.autograd.Function):
    """Cross entropy of each token, with the gradient written over the saved log-probabilities.

    `F.cross_entropy` fills two more tensors of (tokens, vocabulary) in its backward pass: a sixth of a step of a small
    model, and most of the memory with a large vocabulary.
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
        # In place: torch refuses a second backward pass, since the saved tensor has changed.
        gradient = log_chances.exp_().mul_(weights)
        gradient.scatter_add_(1, targets.clamp(min=0).unsqueeze(1), -weights)
        return gradient.to(ctx.dtype), None


def pick_scored(block: dict[str, Tensor]) -> None:
    """Add `scored`, the k indices in rows * tokens whose target is scored; reduce `labels` and `owner` to them.

    A block without scored tokens, or with scored tokens only, is unchanged.
    """
    targets = F.pad(block["labels"], (0, 1), value=IGNORED)[:, 1:].flatten()
    scored = (targets != IGNORED).nonzero().squeeze(1)
    if 0 < len(scored) < len(targets):
        block["scored"], block["labels"] = scored, targets[scored]
        if "owner" in block:
            block["owner"] = block["owner"].flatten()[scored]


def can_pick(model: Any, ids: Sequence[int], tolerance: float) -> bool:
    """Return True if the logits of selected tokens equal those computed for all tokens.

    Args:
        ids: a few tokens.
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
        # A head with another call signature, or a model without a head.
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
    """Terms of the contrastive loss of each of n rows, both (n,).

    `distance` is |s| summed over attributes; `share` the weight of the row's term in scored tokens, 0 at strength 0.

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
    nll: Tensor, owner: Tensor, terms: dict[str, Tensor], weight: float, margin: float
) -> tuple[Tensor, Tensor]:
    """LM loss and weighted contrastive loss of one block, summed over its scored tokens.

    Args:
        nll: -log p of each token, (k,), 0 for tokens that are not scored.
        owner: of each token, its row i at the row's strength, or n + i at the opposite strength, (k,).
        terms: see `pair_terms`.
        margin: in nats, for s = 1.
    """
    terms = {name: tensor.to(nll.device) for name, tensor in terms.items()}
    rows = len(terms["share"])
    # A product rather than index_add: on a GPU its order of additions is not deterministic.
    belongs = owner.to(nll.device).flatten() == torch.arange(2 * rows, device=nll.device).unsqueeze(1)
    own, opposite = (belongs.to(nll.dtype) @ nll).split(rows)
    pairs = terms["share"] * F.softplus(margin * terms["distance"] + own - opposite)
    return own.sum(), weight * pairs.sum()


def measure(
    model: Any,
    examples: Examples,
    conditioner: Conditioner | None,
    pad_id: int,
    batch_size: int,
    report: Report,
    stage: str,
) -> Likelihood:
    """Likelihood of all examples with equal weight for every token, each example at its own condition. Collective."""
    rows, count = list(range(len(examples.items))), len(examples.items)
    if world_size() > 1:
        # Every process measures equally many examples, since FSDP needs equally many calls; a repeated one has no
        # weight.
        order = sorted(rows, key=lambda row: -len(examples.items[row].ids))
        rows = order[rank() :: world_size()]
        count = len(rows)
        rows = rows + order[: -(-len(order) // world_size()) - count]

    def condition(batch: Sequence[int]) -> None:
        if conditioner is not None:
            with torch.no_grad():
                conditioner.apply(conditioner.strengths([examples.conditions[rows[index]] for index in batch]))

    try:
        items = [examples.items[row] for row in rows]
        found = likelihoods(model, items, pad_id, batch_size, report, stage, condition)
    finally:
        if conditioner is not None:
            conditioner.clear()
    return sum(gathered(sum(found[:count], Likelihood())), Likelihood())
