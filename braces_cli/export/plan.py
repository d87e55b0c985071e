"""How a merged checkpoint is to be written: the types that the planner makes and the writer reads."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from braces_cli.export.ffn_form import Form

# What classes of transformers, each in its own way, raise where they do not take a config or a value in it.
REFUSALS = (
    ValueError, TypeError, LookupError, AttributeError, RuntimeError, AssertionError, ArithmeticError,
    StrictDataclassError,
)  # fmt: skip


@dataclass(frozen=True)
class Role:
    """What a tensor of the written checkpoint is to an FFN.

    Attributes:
        ffn: index among the FFNs.
        part: `gate`, `up`, `gate_up` or `key`, and `value`; with `.bias` behind it for a bias.
        dim: along which its neurons lie; unused for the bias of `value`.
    """

    ffn: int
    part: str
    dim: int


@dataclass(frozen=True)
class Plan:
    """How the checkpoint is to be written.

    Attributes:
        case: `a`, `b` or `c`, see above.
        config: of the written model.
        architecture: its class.
        shapes: its tensors, tied ones once, in order.
        sources: where each comes from: tensor of the base, first row and row behind the last (None: all); tensors that
            are not listed are biases that the base lacks, and start as zeros.
        roles: the tensors that change.
        form: of the base's FFN.
        width, wider: d_ff before and after.
        gate: (c, act(c)); (0, 1) where there is no gate.
    """

    case: str
    config: Any
    architecture: str
    shapes: dict[str, torch.Size]
    sources: dict[str, tuple[str, int | None, int | None]]
    roles: dict[str, Role]
    form: Form
    width: int
    wider: int
    gate: tuple[float, float] = field(default=(0.0, 1.0))


def tensor_shapes(model: Any) -> dict[str, torch.Size]:
    """Shapes of what a checkpoint of `model` holds, tied tensors once, under the name that comes first."""
    shapes: dict[str, torch.Size] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            shapes[name] = tensor.shape
    return shapes


def on_meta(kind: type, config: Any) -> Any:
    """A model without weights, None where its class does not take the config."""
    try:
        with torch.device("meta"):
            return kind(config)
    except REFUSALS:
        return None
