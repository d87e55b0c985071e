"""Decide how an adapter is written into a plain checkpoint, from the structure of the model and from its config.

    (a) gated, biases available         d_r neurons: gate weight 0, gate bias c, up rows A, down columns B / act(c)
    (b) gated, equivalent to a Llama    written as a Llama (`export.llama`), then as (a)
    (c) not gated                       2 d_r neurons: input rows A and -A, output columns B and -B
    else                                refused: a merge is never approximate

A forward pass shows what the FFN computes. The config with wider FFNs and biases is found by changing its fields one by
one and comparing the shapes of the resulting model, on the meta device, with those that are needed.
"""

import copy
from collections.abc import Callable, Sequence
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
        parts: `gate`, `up`, `key` or `value` for a weight; with the suffix `.bias` for a bias. Two if they are fused.
        dim: dimension of the neurons of all parts; None for the bias of `value`, which has no neurons.
    """

    layer: int
    parts: tuple[str, ...]
    dim: int | None


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
        ffns, form: of the base.
        width, wider: d_ff before and after.
        gate: (c, act(c)); (0, 1) without a gate.
    """

    case: str
    config: Any
    architecture: str
    shapes: dict[str, torch.Size]
    sources: Sources
    roles: dict[str, Role]
    ffns: Sequence[FFN]
    form: Form
    width: int
    wider: int
    gate: tuple[float, float]

    @property
    def size(self) -> dict[str, int]:
        """Parameters of the written model, for a dry run."""
        total = sum(shape.numel() for shape in self.shapes.values())
        return {"trainable_parameters": 0, "total_parameters": total}


def ffn_form(model: Any, ffns: Sequence[FFN | MixtureFFN], ids: Tensor | None = None) -> tuple[list[FFN], Form]:
    """Return the FFNs and their form, observed in a forward pass over `ids` (batch, tokens).

    Without `ids`, for a model without weights, the form has the gate first, and the first activation found.

    Raises:
        ModelError: mixtures of experts, quantised weights, different FFNs, or an FFN that computes something else, such
            as a clamp or a norm in between.
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
    # Activations in the modules around the projections, then the common ones.
    host, keys = plain[0].host, plain[0].keys
    owners = [each for each in host.modules() if any(child in (*keys, plain[0].value) for child in each.children())]
    known = [each for owner in dict.fromkeys((host, *owners)) for each in activations(owner)]
    known += _COMMON
    if ids is None:
        fused = len(keys) == 1 and sizes(keys[0])[1] == 2 * widths[0]
        return plain, Form(fused or len(keys) > 1, fused, True, known[0])
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def keep(module: nn.Module, args: tuple, output: Tensor) -> None:
        seen[module] = args[0].detach(), output.detach()

    with ExitStack() as stack, torch.no_grad():
        for ffn in plain:
            for module in (*ffn.keys, ffn.value):
                stack.callback(module.register_forward_hook(keep).remove)
        model(input_ids=ids, use_cache=False)
    first: Form | None = None
    for ffn in plain:
        form = _matching_form(known, [seen[key][1] for key in ffn.keys], seen[ffn.value][0])
        if form is None or form != (first or form):
            other = "an activation of its projections" if first is None else "what the layers before it compute"
            raise refuse(model, f"the FFN of layer {ffn.layer} computes something else than {other}")
        first, known = form, [form.activation]
    assert first is not None
    return plain, first


def _matching_form(known: Sequence[Activation], outputs: list[Tensor], w: Tensor) -> Form | None:
    """Return the form that computes `w` from the outputs of the projections, or None."""
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
    model: Any, ffns: Sequence[FFN], form: Form, neurons: int, pad_to_multiple_of: int, biases: Sequence[str] = ()
) -> Plan:
    """Plan the checkpoint of `model` with more neurons in its FFNs.

    Args:
        ffns, form: from `ffn_form`.
        neurons: minimum number of new neurons; 0 for new biases only.
        pad_to_multiple_of: the new width is rounded up to a multiple of this.
        biases: parts that need a bias: `value` for a constant output, `up` or `key` for a constant neuron.

    Raises:
        ModelError: an exact checkpoint is not possible.
    """
    if getattr(model.config, "auto_map", None):
        raise refuse(model, "it brings its own code, which a plain checkpoint cannot use")
    width = ffns[0].value_vectors
    wider = -(-(width + neurons) // pad_to_multiple_of) * pad_to_multiple_of
    gate = form.constant_gate if neurons and form.gated else (0.0, 1.0)
    if gate is None:
        raise refuse(model, f"its gate's {form.name} turns no constant into a power of two")
    if neurons and not form.gated and not form.is_half_linear:
        raise refuse(model, f"its FFN has no gate, and for {form.name} act(z) - act(-z) = z does not hold")
    needed = {f"{part}.bias" for part in (*biases, *(["gate"] if form.gated else []))}
    roles = _roles(model, ffns, form)
    found = _wider_config(model, roles, width, wider, needed)
    if found is not None:
        config, after = found
        case, architecture = "a" if form.gated else "c", type(model).__name__
        before = tensor_shapes(model)
        sources: Sources = {name: (name, None, None) for name in after if name in before}
        return Plan(case, config, architecture, after, sources, roles, ffns, form, width, wider, gate)
    if not form.gated:
        bias = "gives its output no bias to carry the steering"
        reason = f"its config fixes the width of the FFN ({width}){', or ' + bias if 'value' in biases else ''}"
        raise refuse(model, reason if neurons else f"its config {bias}")
    from transformers import LlamaForCausalLM

    why = "its gated FFN has no biases to switch on, and it is not a Llama ({})"
    converted = as_llama(model, form.activation, form.name, width)
    if isinstance(converted, str):
        raise refuse(model, why.format(converted))
    config, sources = converted
    config.mlp_bias, config.intermediate_size = True, wider
    after = tensor_shapes(on_meta(LlamaForCausalLM, config))
    roles = {}
    for ffn in ffns:
        for part, projection, dim, bias_dim in (("gate", "gate", 0, 0), ("up", "up", 0, 0), ("value", "down", 1, None)):
            name = f"model.layers.{ffn.layer}.mlp.{projection}_proj"
            roles[f"{name}.weight"] = Role(ffn.layer, (part,), dim)
            roles[f"{name}.bias"] = Role(ffn.layer, (f"{part}.bias",), bias_dim)
    return Plan("b", config, "LlamaForCausalLM", after, sources, roles, ffns, form, width, wider, gate)


def _roles(model: nn.Module, ffns: Sequence[FFN], form: Form) -> dict[str, Role]:
    """Roles of the projections' weights and biases by tensor name; biases are listed even if the model has none."""
    names = {module: name for name, module in model.named_modules()}
    parts = ("key",) if not form.gated else ("gate", "up") if form.gate_first else ("up", "gate")
    groups = [parts] if form.fused else [(part,) for part in parts]
    roles: dict[str, Role] = {}
    for ffn in ffns:
        for module, group in zip((*ffn.keys, ffn.value), (*groups, ("value",)), strict=True):
            # transformers' Conv1D stores (inputs, outputs).
            is_value = group == ("value",)
            dim = int(is_value == hasattr(module, "out_features"))
            roles[f"{names[module]}.weight"] = Role(ffn.layer, group, dim)
            biases = tuple(f"{part}.bias" for part in group)
            roles[f"{names[module]}.bias"] = Role(ffn.layer, biases, None if is_value else 0)
    return roles


def _wider_config(
    model: Any, roles: dict[str, Role], width: int, wider: int, needed: set[str]
) -> tuple[Any, dict[str, torch.Size]] | None:
    """Return the config with FFNs of width `wider` and biases of the parts `needed`, and its model's tensors.

    One field that may be the width is changed, and bias switches are turned on, until the tensors are those of `model`
    with these differences only.
    """
    before, values = tensor_shapes(model), vars(model.config.get_text_config())
    expected = {name: list(shape) for name, shape in before.items()}
    for name, role in roles.items():
        if name in expected and role.dim is not None:
            expected[name][role.dim] += (wider - width) * len(role.parts)
    biases = [name for name, role in roles.items() if needed.intersection(role.parts)]
    filled = [name for name, value in values.items() if value == width and isinstance(value, int)]
    empty = [name for name, value in values.items() if value is None and any(word in name for word in _WIDTH_WORDS)]
    switches = [name for name, value in values.items() if value is False and "bias" in name]
    # One switch, then all: some configs require equal switches.
    attempts = [(name, on) for name in (*filled, *empty) for on in ((), *((switch,) for switch in switches), switches)]
    for field, on in attempts:
        config = copy.deepcopy(model.config)
        try:
            setattr(config.get_text_config(), field, wider)
            for switch in on:
                setattr(config.get_text_config(), switch, True)
            type(config).from_dict(config.to_dict())
        except REFUSALS:
            continue
        target = on_meta(type(model), config)
        after = {} if target is None else tensor_shapes(target)
        has_expected = all(list(after.get(name, ())) == shape for name, shape in expected.items())
        has_only_biases = all(name in before or name.endswith(".bias") for name in after)
        if has_expected and has_only_biases and all(name in after for name in biases):
            return config, after
    return None
