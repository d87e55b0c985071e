"""How far an attribute pushes without training, and in which layers."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from braces_cli.core.attributes.pooling import residual_norms
from braces_cli.core.attributes.word_lists import neutral_texts
from braces_cli.core.models.loading import input_device
from braces_cli.core.models.residual_join import residual_gains
from braces_cli.core.models.tokenization import encode
from braces_cli.core.session import Session

# Without training, s = 1 pushes by this share of the median residual norm in all, spread evenly over the layers pushed:
# pushes along one direction add up in the residual stream, so what counts is their sum, whatever the depth.
STEERING_SHARE = 0.1


def default_layers(layers: Sequence[int]) -> list[int]:
    """The layers that are pushed without training where none are named: the first half. What is pushed there, the rest
    of the model makes language of; the same push at the end costs more perplexity for less of the attribute.
    """
    return list(layers[: (len(layers) + 1) // 2])


def output_norms(session: Session) -> Tensor:
    """Norm of what, added to what the FFN writes, moves the residual stream behind its layer by its own median norm:
    (layers,). It is that norm itself where the FFN's output is added as it is. An adapter that is attached stays out.
    """
    base = session.base
    ids = torch.tensor([encode(base.tokenizer, neutral_texts()[0]).ids], device=input_device(base.model))
    with nullcontext() if session.adapter is None else session.adapter.disabled():
        gains = residual_gains(base.model, session.ffns, ids)
        norms = residual_norms(base.model, base.tokenizer, session.ffns)
    # A layer whose FFN cannot be heard at all is not pushed harder for it.
    return norms / torch.where(gains.isfinite() & (gains > 0), gains, torch.ones_like(gains))


def steering_scale(residual: Tensor, direction: Tensor, steered_layers: Sequence[int]) -> Tensor:
    """What makes `scale * direction` the push of s = 1, the same share of the residual norm in each layer: (layers,).

    Where there is no direction, no push rather than a division by zero.

    Args:
        residual: see `output_norms`.
        pushed: the layers over which STEERING_SHARE is spread.
    """
    size = direction.norm(dim=-1)
    return torch.where(size > 0, STEERING_SHARE / max(len(steered_layers), 1) * residual / size, torch.zeros_like(size))
