"""Decide how an adapter is written into a plain checkpoint, from the structure of the model and from its config.

    (a) gated, biases available         d_r neurons: gate weight 0, gate bias c, up rows A, down columns B / act(c)
    (b) gated, equivalent to a Llama    written as a Llama (`export.llama`), then as (a)
    (c) not gated                       2 d_r neurons: input rows A and -A, output columns B and -B
    else                                refused: a merge is never approximate

A forward pass shows what the FFN computes. The config with wider FFNs and biases is found by changing its fields one by
one and comparing the shapes of the resulting model, on the meta device, with those that are needed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from braces_cli.core.errors import ModelError
from braces_cli.core.models.ffn import FFN, MixtureFFN
from braces_cli.core.models.structure import REFUSALS, activations, on_meta, sizes, tensor_shapes
from braces_cli.export.llama import Sources, as_llama

Activation = Callable[[Tensor], Tensor]

CODE_EXPORT = "Write it with its modelling file (braces export code), or serve it with braces steer --adapter"
ALTERNATIVES = f"{CODE_EXPORT}; an attribute alone may go into a control vector (braces export control-vector)."

# Tried if the model has no activation module or attribute.
_COMMON: tuple[Activation, ...] = (functional.silu, functional.gelu, functional.relu)
_WORKING_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Relative rounding error of one product and one activation.
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
# Words in the names of config fields that may set the width of the FFN even if their value is None.
_WIDTH_WORDS = ("inner", "ffn", "intermediate")


def refuse(model: Any, reason: str, hint: str = ALTERNATIVES) -> ModelError:
    """Return the error for a model that cannot be merged."""
    return ModelError(f"{type(model).__name__} cannot be merged: {reason}", hint=hint)


@dataclass(frozen=True)
class Form:
    """Computation of the FFNs of a model between their projections.

    Attributes:
        gated: w = act(gate(h)) * up(h); otherwise w = act(key(h)).
        fused: gate and up are one projection.
        gate_first: the gate comes before up, in the list of projections or in the fused projection.
        activation: as the model calls it.
    """

    gated: bool
    fused: bool
    gate_first: bool
    activation: Activation

    @property
    def name(self) -> str:
        """Name of the activation."""
        return getattr(self.activation, "__name__", type(self.activation).__name__)

    @property
    def constant_gate(self) -> tuple[float, float] | None:
        """(c, act(c)), both powers of two in every working dtype; None without such a c.

        Multiplying by a power of two does not round, so what is divided by act(c) keeps all its digits.
        """
        for c in (32.0, 16.0, 8.0, 4.0, 2.0, 1.0):
            values = {float(self.activation(torch.tensor([c], dtype=dtype))) for dtype in _WORKING_DTYPES}
            value = values.pop()
            if not values and value > 0 and torch.frexp(torch.tensor(value)).mantissa == 0.5:
                return c, value
        return None

    @property
    def is_half_linear(self) -> bool:
        """act(z) - act(-z) = z, as for all variants of GELU, SiLU and ReLU."""
        z = torch.linspace(-20, 20, 4001, dtype=torch.float64)
        return bool((self.activation(z) - self.activation(-z) - z).abs().max() < 1e-9)


@dataclass(frozen=True)
class Role:
    """Role of a tensor of the written checkpoint in an FFN.

    Attributes:
        layer: decoder layer of the FFN.
        part: `gate`, `up`, `gate_up`, `key` or `value` for a weight; with the suffix `.bias` for a bias.
        dim: dimension of its neurons; not used for the bias of `value`.
    """

    layer: int
    part: str
    dim: int


@dataclass(frozen=True)
class Plan:
    """Plan of the checkpoint.

    Attributes:
        case: `a`, `b` or `c` of the module's docstring.
        config: of the written model.
        architecture: class of the written model.
        shapes: its tensors in order, tied ones once.
        sources: tensor of the base, first row and end row (None: all) of each; other tensors are new biases, zero.
        roles: the tensors that change.
        form: of the base's FFNs.
        width, wider: d_ff before and after.
        gate: (c, act(c)); (0, 1) without a gate.
    """

    case: str
    config: Any
    architecture: str
    shapes: dict[str, torch.Size]
    sources: Sources
    roles: dict[str, Role]
    form: Form
    width: int
    wider: int
    gate: tuple[float, float] = (0.0, 1.0)


def plain_ffns(model: Any, ffns: Sequence[FFN | MixtureFFN]) -> list[FFN]:
    """Return the FFNs if none is a mixture of experts, all have one width, and no weight is quantised.

    Raises:
        ModelError: otherwise.
    """
    plain = [ffn for ffn in ffns if isinstance(ffn, FFN)]
    if len(plain) < len(ffns):
        # Without the hint at control vectors, which a mixture cannot have.
        reason = "it mixes experts, and what an adapter adds there depends on the router"
        raise refuse(model, reason, hint=f"{CODE_EXPORT}.")
    widths = sorted({ffn.value_vectors for ffn in plain})
    if len(widths) > 1:
        raise refuse(model, f"its FFNs have different widths ({', '.join(map(str, widths))})")
    for ffn in plain:
        weights = [getattr(end, "weight", None) for end in (*ffn.keys, ffn.value)]
        if not all(isinstance(w, Tensor) and w.dtype.is_floating_point and w.dtype.itemsize > 1 for w in weights):
            raise refuse(model, "its weights are quantised")
    return plain


def _activations(ffn: FFN) -> list[Activation]:
    """Activations that the FFN may use: those in the modules around its projections, then the common ones."""
    ends = (*ffn.keys, ffn.value)
    owners = [module for module in ffn.host.modules() if any(child in ends for child in module.children())]
    owned = [each for owner in dict.fromkeys((ffn.host, *owners)) for each in activations(owner)]
    return [*owned, *_COMMON]


def expected_form(ffn: FFN) -> Form:
    """Guess the form of a model without weights: gate first, and the first activation found."""
    fused = len(ffn.keys) == 1 and sizes(ffn.keys[0])[1] == 2 * ffn.value_vectors
    return Form(fused or len(ffn.keys) > 1, fused, True, _activations(ffn)[0])


def observed_form(model: Any, ffns: Sequence[FFN], ids: Tensor) -> Form:
    """Return the one form of all FFNs, observed in a forward pass over `ids` (batch, tokens).

    Raises:
        ModelError: an FFN computes something else, such as a clamp or a norm in between, or the FFNs differ.
    """
    outputs: dict[nn.Module, Tensor] = {}
    inputs: dict[nn.Module, Tensor] = {}

    def keep_output(module: nn.Module, args: tuple, output: Tensor) -> None:
        outputs[module] = output.detach()

    def keep_input(module: nn.Module, args: tuple) -> None:
        inputs[module] = args[0].detach()

    with ExitStack() as stack:
        for ffn in ffns:
            for key in ffn.keys:
                stack.callback(key.register_forward_hook(keep_output).remove)
            stack.callback(ffn.value.register_forward_pre_hook(keep_input).remove)
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
    first: Form | None = None
    for ffn in ffns:
        known = _activations(ffn) if first is None else [first.activation]
        form = _matching_form(known, [outputs[key] for key in ffn.keys], inputs[ffn.value])
        if form is None or form != (first or form):
            other = "an activation of its projections" if first is None else "what the layers before it compute"
            raise refuse(model, f"the FFN of layer {ffn.layer} computes something else than {other}")
        first = first or form
    assert first is not None
    return first


def _matching_form(known: Sequence[Activation], outputs: list[Tensor], w: Tensor) -> Form | None:
    """The form that computes `w` from the outputs of the projections, or None."""
    fused = len(outputs) == 1 and outputs[0].shape[-1] == 2 * w.shape[-1]
    parts = list(outputs[0].chunk(2, dim=-1)) if fused else outputs
    if len(parts) > 2:
        return None
    orders = [(True, parts)] if len(parts) == 1 else [(True, parts), (False, parts[::-1])]
    for activation in known:
        for gate_first, (gate, *up) in orders:
            computed = activation(gate) if not up else activation(gate) * up[0]
            near = _TOLERANCE.get(w.dtype, 1e-5) * w.abs().max()
            if computed.shape == w.shape and (computed - w).abs().max() <= near:
                return Form(bool(up), fused, gate_first, activation)
    return None


def plan(
    model: Any,
    ffns: Sequence[FFN],
    form: Form,
    rank: int,
    pad_to_multiple_of: int,
    steering: bool,
    constant: bool = False,
) -> Plan:
    """Plan the checkpoint of `model` with an adapter of `rank`.

    Args:
        ffns: of the model, from `plain_ffns`.
        pad_to_multiple_of: the new width is rounded up to a multiple of this.
        steering: a constant vector is added, which needs an output bias.
        constant: one of the new neurons is a constant, which needs a bias of the projection that it reads.

    Raises:
        ModelError: an exact checkpoint is not possible.
    """
    if getattr(model.config, "auto_map", None):
        raise refuse(model, "it brings its own code, which a plain checkpoint cannot use")
    width = ffns[0].value_vectors
    wider = -(-(width + (rank if form.gated else 2 * rank)) // pad_to_multiple_of) * pad_to_multiple_of
    needed = {"value.bias"} if steering else set()
    if constant:
        needed.add("key.bias" if not form.gated else "gate_up.bias" if form.fused else "up.bias")
    gate = form.constant_gate if form.gated else (0.0, 1.0)
    if gate is None:
        raise refuse(model, f"its gate's {form.name} turns no constant into a power of two")
    if not form.gated and not form.is_half_linear:
        raise refuse(model, f"its FFN has no gate, and for {form.name} act(z) - act(-z) = z does not hold")
    if form.gated:
        needed.add("gate_up.bias" if form.fused else "gate.bias")
    roles, shapes = ffn_roles(model, ffns, form), tensor_shapes(model)
    for config in _wider_configs(model.config, width, wider):
        target = on_meta(type(model), config)
        if target is None:
            continue
        target_shapes = tensor_shapes(target)
        if _fits(shapes, target_shapes, roles, wider - width, needed):
            sources: Sources = {name: (name, None, None) for name in target_shapes if name in shapes}
            roles = {name: role for name, role in roles.items() if name in target_shapes}
            case = "a" if form.gated else "c"
            return Plan(
                case, config, type(model).__name__, target_shapes, sources, roles, form, width, wider, gate
            )  # fmt: skip
    if not form.gated:
        bias = ", or gives its output no bias to carry the steering" if steering else ""
        raise refuse(model, f"its config fixes the width of the FFN ({width}){bias}")
    return _llama_plan(model, ffns, form, wider, gate)


def _llama_plan(model: Any, ffns: Sequence[FFN], form: Form, wider: int, gate: tuple[float, float]) -> Plan:
    """Plan case (b), for a gated model whose class has no biases to switch on."""
    from transformers import LlamaForCausalLM

    why = "its gated FFN has no biases to switch on, and it is not a Llama ({})"
    width = ffns[0].value_vectors
    converted = as_llama(model, form.activation, form.name, width)
    if isinstance(converted, str):
        raise refuse(model, why.format(converted))
    config, sources = converted
    config.mlp_bias, config.intermediate_size = True, wider
    shapes = tensor_shapes(on_meta(LlamaForCausalLM, config))
    other = [name for name in shapes if name not in sources and not name.endswith(".bias")]
    other += sorted(sources.keys() - shapes.keys())
    if other:
        raise refuse(model, why.format(f"the tensor {other[0]}"))
    roles: dict[str, Role] = {}
    for ffn in ffns:
        for part, dim in (("gate", 0), ("up", 0), ("value", 1)):
            name = f"model.layers.{ffn.layer}.mlp.{'down' if part == 'value' else part}_proj"
            roles[f"{name}.weight"] = Role(ffn.layer, part, dim)
            roles[f"{name}.bias"] = Role(ffn.layer, f"{part}.bias", 0)
    return Plan("b", config, "LlamaForCausalLM", shapes, sources, roles, form, width, wider, gate)


def ffn_roles(model: nn.Module, ffns: Sequence[FFN], form: Form) -> dict[str, Role]:
    """Roles of the projections' weights and biases by tensor name; biases are listed even if the model has none."""
    names = {module: name for name, module in model.named_modules()}
    parts = ["key"] if not form.gated else ["gate_up"] if form.fused else ["gate", "up"]
    if len(parts) == 2 and not form.gate_first:
        parts.reverse()
    roles: dict[str, Role] = {}
    for ffn in ffns:
        for module, part in zip((*ffn.keys, ffn.value), (*parts, "value"), strict=True):
            # transformers' Conv1D stores (inputs, outputs).
            dim = int((part == "value") == hasattr(module, "out_features"))
            roles[f"{names[module]}.weight"] = Role(ffn.layer, part, dim)
            roles[f"{names[module]}.bias"] = Role(ffn.layer, f"{part}.bias", 0)
    return roles


def _wider_configs(config: Any, width: int, wider: int) -> Iterator[Any]:
    """Copies of `config` in which one field that may be the width is changed, and bias switches are turned on."""
    values = vars(config.get_text_config())
    filled = [name for name, value in values.items() if value == width and isinstance(value, int)]
    empty = [name for name, value in values.items() if value is None and any(word in name for word in _WIDTH_WORDS)]
    switches = [name for name, value in values.items() if value is False and "bias" in name]
    for name in (*filled, *empty):
        # One switch, then all: some configs require equal switches.
        for on in ((), *((switch,) for switch in switches), switches):
            changed = copy.deepcopy(config)
            try:
                setattr(changed.get_text_config(), name, wider)
                for switch in on:
                    setattr(changed.get_text_config(), switch, True)
                type(changed).from_dict(changed.to_dict())
            except REFUSALS:
                continue
            yield changed


def _fits(
    before: dict[str, torch.Size], after: dict[str, torch.Size], roles: dict[str, Role], added: int, needed: set[str]
) -> bool:
    """Return True if `after` is `before` with FFNs wider by `added` and with biases, including the parts `needed`."""
    for name, shape in before.items():
        role = roles.get(name)
        expected = list(shape)
        if role is not None and role.part != "value.bias":
            expected[role.dim] += added * (2 if role.part.startswith("gate_up") else 1)
        if list(after.get(name, ())) != expected:
            return False
    biases = [name for name, role in roles.items() if role.part in needed]
    return all(name in before or name.endswith(".bias") for name in after) and all(name in after for name in biases)
