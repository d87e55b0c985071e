"""What a feed-forward layer computes between its ends, read off a pass through it, and what can be built from that.

    plain     w = act(k(h))                  new neurons in pairs,  act(z) - act(-z) = z
    gated     w = act(gate(h)) * up(h)       new neurons whose gate is a constant c,  act(c) (A h)

Nothing is believed that was not seen: a clamp, a norm or a number between the two ends makes a layer neither.

How a merged checkpoint is to be written: the types that the planner makes and the writer reads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from torch.nn import functional

from braces_cli.core.errors import ModelError
from braces_cli.core.models.ffn import FFN
from braces_cli.core.models.structure import activations, sizes

Activation = Callable[[Tensor], Tensor]

MODELLING_FILE = "Write it with its modelling file (braces export code), or serve it with braces steer --adapter"
ALTERNATIVES = f"{MODELLING_FILE}; an attribute alone may go into a control vector (braces export control-vector)."

# Where a model calls its activation in a way that leaves no trace.
_COMMON: tuple[Activation, ...] = (functional.silu, functional.gelu, functional.relu)
_WORKING_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Rounding of one product and one activation.
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def refuse(model: Any, reason: str, hint: str = ALTERNATIVES) -> ModelError:
    """The error of a model that cannot be merged, with what works instead."""
    return ModelError(f"{type(model).__name__} cannot be merged: {reason}", hint=hint)


@dataclass(frozen=True)
class Form:
    """How the neurons of all layers work.

    Attributes:
        gated: two products with h, one of them through the activation.
        fused: gate and up are one projection, the one below the other.
        gate_first: the gate comes before up, among the keys or within the fused one.
        activation: as the model calls it.
    """

    gated: bool
    fused: bool
    gate_first: bool
    activation: Activation

    @property
    def name(self) -> str:
        """Of the activation."""
        return getattr(self.activation, "__name__", type(self.activation).__name__)


def candidates(ffn: FFN) -> list[Activation]:
    """Activations that the FFN may use: those owned by what owns its ends, then the common ones."""
    ends = (*ffn.keys, ffn.value)
    owners = [module for module in ffn.host.modules() if any(child in ends for child in module.children())]
    owned = [each for owner in dict.fromkeys((ffn.host, *owners)) for each in activations(owner)]
    return [*owned, *_COMMON]


def expected_form(ffn: FFN) -> Form:
    """The form by sizes and names alone, of a model without weights: gate first, the first activation found."""
    fused = len(ffn.keys) == 1 and sizes(ffn.keys[0])[1] == 2 * ffn.value_vectors
    return Form(fused or len(ffn.keys) > 1, fused, True, candidates(ffn)[0])


def observed_form(model: Any, ffns: Sequence[FFN], ids: Tensor) -> Form:
    """The one form of all layers, seen in a pass over the tokens `ids` (1, tokens).

    Raises:
        ModelError: a layer computes something else, or layers differ.
    """
    outputs: dict[nn.Module, Tensor] = {}
    entered: dict[nn.Module, Tensor] = {}

    def keep_output(module: nn.Module, args: tuple, output: Tensor) -> None:
        outputs[module] = output.detach()

    def keep_input(module: nn.Module, args: tuple) -> None:
        entered[module] = args[0].detach()

    with ExitStack() as stack:
        for ffn in ffns:
            for key in ffn.keys:
                stack.callback(key.register_forward_hook(keep_output).remove)
            stack.callback(ffn.value.register_forward_pre_hook(keep_input).remove)
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
    first: Form | None = None
    for ffn in ffns:
        known = candidates(ffn) if first is None else [first.activation]
        form = _fitting(known, [outputs[key] for key in ffn.keys], entered[ffn.value])
        if form is None or form != (first or form):
            other = "what its activation makes of the keys" if first is None else "what the layers before it compute"
            raise refuse(model, f"the FFN of layer {ffn.layer} computes something else than {other}")
        first = first or form
    assert first is not None
    return first


def _fitting(known: Sequence[Activation], outputs: list[Tensor], w: Tensor) -> Form | None:
    """The form that turns the keys' `outputs` into `w`, None where there is no such form."""
    fused = len(outputs) == 1 and outputs[0].shape[-1] == 2 * w.shape[-1]
    parts = list(outputs[0].chunk(2, dim=-1)) if fused else outputs
    if len(parts) > 2:
        return None
    orders = [(True, parts)] if len(parts) == 1 else [(True, parts), (False, parts[::-1])]
    for activation in known:
        for gate_first, (gate, *up) in orders:
            made = activation(gate) if not up else activation(gate) * up[0]
            near = _TOLERANCE.get(w.dtype, 1e-5) * w.abs().max()
            if made.shape == w.shape and (made - w).abs().max() <= near:
                return Form(bool(up), fused, gate_first, activation)
    return None


def constant_gate(activation: Activation) -> tuple[float, float] | None:
    """(c, act(c)), both powers of two in every working dtype; None where there is no such c.

    Multiplying by a power of two rounds nothing, so what is divided by act(c) keeps all its digits.
    """
    for c in (32.0, 16.0, 8.0, 4.0, 2.0, 1.0):
        made = {float(activation(torch.tensor([c], dtype=dtype))) for dtype in _WORKING_DTYPES}
        value = made.pop()
        if not made and value > 0 and torch.frexp(torch.tensor(value)).mantissa == 0.5:
            return c, value
    return None


def is_half_linear(activation: Activation) -> bool:
    """act(z) - act(-z) = z: GELU in all its forms, SiLU, ReLU."""
    z = torch.linspace(-20, 20, 4001, dtype=torch.float64)
    return bool((activation(z) - activation(-z) - z).abs().max() < 1e-9)


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
