"""Relevance scores of value vectors, written out: what the adapter's low-rank form never builds."""

from __future__ import annotations

import torch
from torch import Tensor

from braces_cli.core.method.relevance import RelevanceModule
from braces_cli.core.models.ffn import FFN
from braces_cli.core.session import Session


def relevance_module(session: Session, ffn: FFN) -> RelevanceModule | None:
    """The adapter's module at an FFN, None where there is none."""
    adapted = session.adapter.adapted_ffns if session.adapter is not None else []
    return next((module for each, module in adapted if each.layer == ffn.layer), None)


def relevance_scores(module: RelevanceModule, h: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Relevance r, and what is added to the activation weights, of every value vector: (n, d_ff) each, in float32.

    Args:
        h: FFN inputs, or hidden states of attributes, (n, d).
        values: W_V (d, d_ff).
    """
    with torch.no_grad():
        scores = module.relevance_scores(h, values)
        return scores, module.g.to(scores) * scores
