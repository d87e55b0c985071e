"""Telling opposite strengths apart: each row should be likelier at its own strength s than at -s, by a margin.

    loss = LM(x | s) + weight * softplus(margin |s| + log p(x | -s) - log p(x | s)),  mean over rows with an attribute

The language-modelling loss alone gains little from an attribute, since most tokens of a text would be the same without
it, and leaves it weak: as weak as attributes are in real text, where steering is meant to exaggerate. The margin, in
nats a row and unit of strength, says by how much. Rows at strength 0 have no opposite and pass once; the others twice,
both times in the same block. What the two passes share is what lies before the first adapted FFN's output, one
attention of the model; from there on every hidden state depends on the strength.

The mean is one of each group of rows of similar length, weighted by the group's scored tokens, whether the groups are
blocks of their own or lie packed in one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from braces_cli.core.models.tokenization import Encoded

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
