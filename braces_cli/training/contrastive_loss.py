"""Telling opposite strengths apart: each row should be likelier at its own strength s than at -s, by a margin.

    loss = LM(x | s) + weight * softplus(margin |s| + log p(x | -s) - log p(x | s)),  mean over rows with an attribute

The language-modelling loss alone gains little from an attribute, since most tokens of a text would be the same without
it, and leaves it weak: as weak as attributes are in real text, where steering is meant to exaggerate. The margin, in
nats a row and unit of strength, says by how much. Rows at strength 0 have no opposite and pass once; the others twice.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from braces_cli.core.models.tokenization import IGNORED
from braces_cli.training.attribute_conditioning import Conditioner


def contrastive_loss(
    model: Any,
    inputs: dict[str, Tensor],
    strengths: Tensor,
    conditioner: Conditioner,
    weight: float,
    margin: float,
    count: Tensor | int | None = None,
) -> Tensor:
    """The loss of one batch.

    Args:
        inputs: `input_ids`, `attention_mask`, `labels`, (rows, tokens) each.
        strengths: (rows, attributes).
        margin: in nats, for s = 1.
        count: scored tokens of all batches of an optimizer step; None for those of this one.
    """
    rows = len(strengths)
    active = (strengths != 0).any(dim=1).nonzero().squeeze(1)
    batch = {name: torch.cat([tensor, tensor[active]]) for name, tensor in inputs.items()}
    labels = batch.pop("labels")[:, 1:]
    conditioner.apply(torch.cat([strengths, -strengths[active]]))
    logits = model(**batch, use_cache=False).logits[:, :-1].float()
    nll = F.cross_entropy(logits.mT, labels, ignore_index=IGNORED, reduction="none").sum(dim=1)
    own = (labels[:rows] != IGNORED).sum()
    loss = nll[:rows].sum() / (own if count is None else count)
    if len(active):
        # A batch's share of the step is that of its tokens, as it is for the first term.
        share = 1.0 if count is None else own / count
        wanted = margin * strengths[active].abs().sum(dim=1).to(nll)
        loss = loss + weight * share * F.softplus(wanted + nll[active] - nll[rows:]).mean()
    return loss
