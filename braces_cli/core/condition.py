"""The trained part of attribute control: h_c = p + MLP(p).

One MLP serves all layers: d -> 64 -> d, GELU, float32. Its last layer starts at zero, so training starts from h_c = p.
"""

from __future__ import annotations

from torch import Tensor, nn

WIDTH = 64


class ConditionMLP(nn.Module):
    """p (..., d) -> h_c (..., d), in float32 whatever the base's dtype."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.up = nn.Linear(hidden_size, WIDTH)
        self.act = nn.GELU()
        self.down = nn.Linear(WIDTH, hidden_size)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def forward(self, state: Tensor) -> Tensor:
        result: Tensor = state + self.down(self.act(self.up(state)))
        return result


def condition_shapes(hidden_size: int) -> dict[str, tuple[int, ...]]:
    """Tensors of the MLP in an adapter file, `condition.*`, and their shapes."""
    return {
        "condition.up.weight": (WIDTH, hidden_size),
        "condition.up.bias": (WIDTH,),
        "condition.down.weight": (hidden_size, WIDTH),
        "condition.down.bias": (hidden_size,),
    }
