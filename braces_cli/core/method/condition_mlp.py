"""The trained part of attribute control: h_c = p + (MLP(p) - MLP(-p)) / 2.

One MLP serves all layers: d -> 64 -> d, GELU, float32. Its last layer starts at zero, so training starts from h_c = p.

It is odd, h_c(-p) = -h_c(p), so that opposites stay opposites: strength s of one is strength -s of the other. A plain
p + MLP(p) learns besides what rows of both have in common, such as their style, as if it belonged to each: measured on
sentiment, most of what it added was that, and steering by -s then left the style, not the mood (recipes/RESULTS.md).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

WIDTH = 64


class ConditionMLP(nn.Module):
    """p (..., d) -> h_c (..., d), in float32 whatever the base's dtype."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.up = nn.Linear(hidden_size, WIDTH)
        self.act = nn.GELU()
        # A bias here would cancel.
        self.down = nn.Linear(WIDTH, hidden_size, bias=False)
        nn.init.zeros_(self.down.weight)

    def forward(self, state: Tensor) -> Tensor:
        ahead, behind = self.act(self.up(torch.stack([state, -state])))
        result: Tensor = state + self.down(ahead - behind) / 2
        return result


def condition_shapes(hidden_size: int) -> dict[str, tuple[int, ...]]:
    """Tensors of the MLP in an adapter file, `condition.*`, and their shapes."""
    return {
        "condition.up.weight": (WIDTH, hidden_size),
        "condition.up.bias": (WIDTH,),
        "condition.down.weight": (hidden_size, WIDTH),
    }
