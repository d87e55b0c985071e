"""Decide how an adapter goes into a plain checkpoint of the same model, by its structure and its config.

    (a) gated, biases to be had      d_r neurons, gate weight 0, gate bias c, up rows A, down columns B / act(c)
    (b) gated, a Llama in disguise   written as a Llama (`merge_llama`), then (a)
    (c) no gate                      2 d_r neurons, input rows A and -A, output columns B and -B
    else                             refused: no merge is ever approximate

Whether the config lets the FFN be wider, and have biases, is found by trying: its fields are changed one by one, and
the model that results, on the meta device, is held to the shapes that are needed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from braces_cli.core.models.ffn import FFN
from braces_cli.core.models.moe import MixtureFFN
from braces_cli.export.ffn_form import Form, constant_gate, is_half_linear, refuse

# Words in the names of config fields that may set the width of the FFN, where the field itself is empty.
_WIDTH_WORDS = ("inner", "ffn", "intermediate")


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


def plain_ffns(model: Any, ffns: Sequence[FFN | MixtureFFN]) -> list[FFN]:
    """The FFNs, where all are plain ones of one width with plain weights.

    Raises:
        ModelError: they are not.
    """
    plain = [ffn for ffn in ffns if isinstance(ffn, FFN)]
    if len(plain) < len(ffns):
        raise refuse(model, "it mixes experts, and what an adapter adds there depends on the router")
    widths = sorted({ffn.value_vectors for ffn in plain})
    if len(widths) > 1:
        raise refuse(model, f"its FFNs have different widths ({', '.join(map(str, widths))})")
    for ffn in plain:
        weights = [getattr(end, "weight", None) for end in (*ffn.keys, ffn.value)]
        if not all(isinstance(w, torch.Tensor) and w.dtype.is_floating_point and w.dtype.itemsize > 1 for w in weights):
            raise refuse(model, "its weights are quantised")
    return plain


def plan(
    model: Any,
    ffns: Sequence[FFN | MixtureFFN],
    form: Form,
    rank: int,
    multiple: int,
    steering: bool,
    constant: bool = False,
) -> Plan:
    """How an adapter of `rank` goes into `model`.

    Args:
        form: of all its FFNs.
        multiple: what the new width is rounded up to a multiple of.
        steering: a constant is to be added, which needs an output bias.
        constant: one of the new neurons is to be a constant, which needs a bias where it reads.

    Raises:
        ModelError: there is no exact way; says why and what works instead.
    """
    plain = plain_ffns(model, ffns)
    if getattr(model.config, "auto_map", None):
        raise refuse(model, "it brings its own code, which would have to travel along")
    width = plain[0].value_vectors
    count = rank if form.gated else 2 * rank
    wider = -(-(width + count) // multiple) * multiple
    needed = {"value.bias"} if steering else set()
    if constant:
        needed.add("key.bias" if not form.gated else "gate_up.bias" if form.fused else "up.bias")
    if not form.gated:
        if not is_half_linear(form.activation):
            raise refuse(model, f"its FFN has no gate, and for {form.name} act(z) - act(-z) = z does not hold")
        found = _widened(model, plain, form, wider, needed)
        if found is None:
            bias = ", or gives its output no bias to carry the steering" if steering else ""
            raise refuse(model, f"its config fixes the width of the FFN ({width}){bias}")
        return _own_plan("c", model, plain, form, wider, *found)
    gate = constant_gate(form.activation)
    if gate is None:
        raise refuse(model, f"no constant goes through its gate's {form.name} unrounded")
    found = _widened(model, plain, form, wider, needed)
    if found is not None:
        return _own_plan("a", model, plain, form, wider, *found, gate=gate)
    from braces_cli.export.llama_conversion import llama_plan

    return llama_plan(model, plain, form, wider, gate)


def _own_plan(
    case: str, model: Any, ffns: Sequence[FFN], form: Form, wider: int, config: Any, target: nn.Module, **gate: Any
) -> Plan:
    """The plan where the base keeps its class and its names."""
    roles = ffn_roles(model, ffns, form)
    shapes = tensor_shapes(target)
    own = tensor_shapes(model)
    return Plan(
        case=case,
        config=config,
        architecture=type(model).__name__,
        shapes=shapes,
        sources={name: (name, None, None) for name in shapes if name in own},
        roles={name: role for name, role in roles.items() if name in shapes},
        form=form,
        width=ffns[0].value_vectors,
        wider=wider,
        **gate,
    )


def tensor_shapes(model: Any) -> dict[str, torch.Size]:
    """Shapes of what a checkpoint of `model` holds, tied tensors once, under the name that comes first."""
    found: dict[str, torch.Size] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            found[name] = tensor.shape
    return found


def ffn_roles(model: nn.Module, ffns: Sequence[FFN], form: Form) -> dict[str, Role]:
    """The role of each weight and bias of the FFNs' ends, under its name in `model`; biases whether there or not."""
    names = {module: name for name, module in model.named_modules()}
    roles: dict[str, Role] = {}
    for index, ffn in enumerate(ffns):
        parts = ["key"] if not form.gated else ["gate_up"] if form.fused else ["gate", "up"]
        if form.gated and not form.fused and not form.gate_first:
            parts.reverse()
        for module, part in zip((*ffn.keys, ffn.value), (*parts, "value"), strict=True):
            # transformers' Conv1D stores (inputs, outputs).
            dim = int((part == "value") == hasattr(module, "out_features"))
            roles[f"{names[module]}.weight"] = Role(index, part, dim)
            roles[f"{names[module]}.bias"] = Role(index, f"{part}.bias", 0)
    return roles


def _widened(model: Any, ffns: Sequence[FFN], form: Form, wider: int, biases: set[str]) -> tuple[Any, nn.Module] | None:
    """(config, model on the meta device) with wider FFNs and the biases that are needed, everything else the same."""
    roles = ffn_roles(model, ffns, form)
    own = tensor_shapes(model)
    needed = biases | ({"gate_up.bias" if form.fused else "gate.bias"} if form.gated else set())
    for config in _configs(model.config, ffns[0].value_vectors, wider):
        target = on_meta(type(model), config)
        if target is not None and _fits(own, tensor_shapes(target), roles, ffns[0].value_vectors, wider, needed):
            return config, target
    return None


def _configs(config: Any, width: int, wider: int) -> Iterator[Any]:
    """Copies of `config` with one field that may be the width changed, and switches of biases turned on."""
    values = vars(config.get_text_config())
    own = [name for name, value in values.items() if value == width and isinstance(value, int)]
    empty = [name for name, value in values.items() if value is None and any(word in name for word in _WIDTH_WORDS)]
    switches = [name for name, value in values.items() if value is False and "bias" in name]
    for name in (*own, *empty):
        # One alone, then all: some configs want their switches alike.
        for on in ((), *((switch,) for switch in switches), switches):
            changed = copy.deepcopy(config)
            try:
                setattr(changed.get_text_config(), name, wider)
                for switch in on:
                    setattr(changed.get_text_config(), switch, True)
                type(changed).from_dict(changed.to_dict())
            except Exception:  # what a config class refuses, it refuses in its own words
                continue
            yield changed


def on_meta(kind: type, config: Any) -> Any:
    """A model without weights, None where its class does not take the config."""
    try:
        with torch.device("meta"):
            return kind(config)
    except Exception:
        return None


def _fits(
    own: dict[str, torch.Size],
    shapes: dict[str, torch.Size],
    roles: dict[str, Role],
    width: int,
    wider: int,
    needed: set[str],
) -> bool:
    """The model with `shapes` is the one with shapes `own`, its FFNs wider, biases added, those `needed` among them."""
    for name, shape in own.items():
        role = roles.get(name)
        wanted = list(shape)
        if role is not None and role.part != "value.bias":
            times = 2 if role.part.startswith("gate_up") else 1
            wanted[role.dim] += times * (wider - width)
        if list(shapes.get(name, ())) != wanted:
            return False
    added = [name for name in shapes if name not in own]
    biases = [name for name, role in roles.items() if role.part in needed]
    return all(name.endswith(".bias") for name in added) and all(name in shapes for name in biases)
