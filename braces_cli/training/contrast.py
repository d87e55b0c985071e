"""Telling opposite strengths apart: each row should be likelier at its own strength s than at -s.

    loss = LM(x | s) + weight * softplus(log p(x | -s) - log p(x | s)),    mean over the rows that have an attribute

The language-modelling loss alone gains little from an attribute, since most tokens of a text would be the same without
it, and leaves it weak. Rows at strength 0 have no opposite and pass once; the others pass twice.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from braces_cli.core.encode import IGNORED
from braces_cli.training.conditions import Conditioner


def contrastive_loss(
    model: Any,
    inputs: dict[str, Tensor],
    strengths: Tensor,
    conditioner: Conditioner,
    weight: float,
    count: Tensor | int | None = None,
) -> Tensor:
    """The loss of one batch.

    Args:
        inputs: `input_ids`, `attention_mask`, `labels`, (rows, tokens) each.
        strengths: (rows, attributes).
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
        loss = loss + weight * share * F.softplus(nll[active] - nll[rows:]).mean()
    return loss
