"""How far an attribute pushes without training, and in which layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Without training, s = 1 pushes by this share of the median residual norm in all, spread evenly over the layers pushed:
# pushes along one direction add up in the residual stream, so what counts is their sum, whatever the depth.
# Files of earlier versions hold their own scale, of 12 %.
PUSH = 0.1


def default_layers(layers: Sequence[int]) -> list[int]:
    """The layers that are pushed without training where none are named: the first half. What is pushed there, the rest
    of the model makes language of; the same push at the end costs more perplexity for less of the attribute.
    """
    return list(layers[: (len(layers) + 1) // 2])


def push_scale(residual: Tensor, direction: Tensor, pushed: Sequence[int]) -> Tensor:
    """What makes `scale * direction` the push of s = 1, the same share of the residual norm in each layer: (layers,).

    Where there is no direction, no push rather than a division by zero.

    Args:
        pushed: the layers over which PUSH is spread.
    """
    size = direction.norm(dim=-1)
    return torch.where(size > 0, PUSH / max(len(pushed), 1) * residual / size, torch.zeros_like(size))
