"""Decide how an adapter goes into a plain checkpoint of the same model, by its structure and its config.

    (a) gated, biases to be had      d_r neurons, gate weight 0, gate bias c, up rows A, down columns B / act(c)
    (b) gated, a Llama in disguise   written as a Llama (`llama_conversion`), then (a)
    (c) no gate                      2 d_r neurons, input rows A and -A, output columns B and -B
    else                             refused: no merge is ever approximate

Whether the config lets the FFN be wider, and have biases, is found by trying: its fields are changed one by one, and
the model that results, on the meta device, is held to the shapes that are needed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from braces_cli.core.models.ffn import FFN, MixtureFFN
from braces_cli.export.form import (
    MODELLING_FILE,
    REFUSALS,
    Form,
    Plan,
    Role,
    constant_gate,
    is_half_linear,
    on_meta,
    refuse,
    tensor_shapes,
)
from braces_cli.export.llama import llama_plan

# Words in the names of config fields that may set the width of the FFN, where the field itself is empty.
_WIDTH_WORDS = ("inner", "ffn", "intermediate")


def plain_ffns(model: Any, ffns: Sequence[FFN | MixtureFFN]) -> list[FFN]:
    """The FFNs, where all are plain ones of one width with plain weights.

    Raises:
        ModelError: they are not.
    """
    plain = [ffn for ffn in ffns if isinstance(ffn, FFN)]
    if len(plain) < len(ffns):
        # A control vector is no way out: none is written for a mixture.
        reason = "it mixes experts, and what an adapter adds there depends on the router"
        raise refuse(model, reason, hint=f"{MODELLING_FILE}.")
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
    pad_to_multiple_of: int,
    steering: bool,
    constant: bool = False,
) -> Plan:
    """How an adapter of `rank` goes into `model`.

    Args:
        form: of all its FFNs.
        pad_to_multiple_of: what the new width is rounded up to a multiple of.
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
    wider = -(-(width + count) // pad_to_multiple_of) * pad_to_multiple_of
    biases = {"value.bias"} if steering else set()
    if constant:
        biases.add("key.bias" if not form.gated else "gate_up.bias" if form.fused else "up.bias")
    if not form.gated:
        if not is_half_linear(form.activation):
            raise refuse(model, f"its FFN has no gate, and for {form.name} act(z) - act(-z) = z does not hold")
        widened = _widened(model, plain, form, wider, biases)
        if widened is None:
            bias = ", or gives its output no bias to carry the steering" if steering else ""
            raise refuse(model, f"its config fixes the width of the FFN ({width}){bias}")
        return _same_class_plan("c", model, plain, form, wider, *widened)
    gate = constant_gate(form.activation)
    if gate is None:
        raise refuse(model, f"no constant goes through its gate's {form.name} unrounded")
    widened = _widened(model, plain, form, wider, biases)
    if widened is not None:
        return _same_class_plan("a", model, plain, form, wider, *widened, gate=gate)
    return llama_plan(model, plain, form, wider, gate)


def _same_class_plan(
    case: str, model: Any, ffns: Sequence[FFN], form: Form, wider: int, config: Any, target: nn.Module, **gate: Any
) -> Plan:
    """The plan where the base keeps its class and its names."""
    roles = ffn_roles(model, ffns, form)
    shapes = tensor_shapes(target)
    of_base = tensor_shapes(model)
    return Plan(
        case=case,
        config=config,
        architecture=type(model).__name__,
        shapes=shapes,
        sources={name: (name, None, None) for name in shapes if name in of_base},
        roles={name: role for name, role in roles.items() if name in shapes},
        form=form,
        width=ffns[0].value_vectors,
        wider=wider,
        **gate,
    )


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
    shapes = tensor_shapes(model)
    needed = biases | ({"gate_up.bias" if form.fused else "gate.bias"} if form.gated else set())
    for config in _configs(model.config, ffns[0].value_vectors, wider):
        target = on_meta(type(model), config)
        if target is not None and _fits(shapes, tensor_shapes(target), roles, ffns[0].value_vectors, wider, needed):
            return config, target
    return None


def _configs(config: Any, width: int, wider: int) -> Iterator[Any]:
    """Copies of `config` with one field that may be the width changed, and switches of biases turned on."""
    values = vars(config.get_text_config())
    filled = [name for name, value in values.items() if value == width and isinstance(value, int)]
    empty = [name for name, value in values.items() if value is None and any(word in name for word in _WIDTH_WORDS)]
    switches = [name for name, value in values.items() if value is False and "bias" in name]
    for name in (*filled, *empty):
        # One alone, then all: some configs want their switches alike.
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
    before: dict[str, torch.Size],
    after: dict[str, torch.Size],
    roles: dict[str, Role],
    width: int,
    wider: int,
    needed: set[str],
) -> bool:
    """Shapes `after` are those `before` with wider FFNs and added biases, those `needed` among them."""
    for name, shape in before.items():
        role = roles.get(name)
        expected = list(shape)
        if role is not None and role.part != "value.bias":
            times = 2 if role.part.startswith("gate_up") else 1
            expected[role.dim] += times * (wider - width)
        if list(after.get(name, ())) != expected:
            return False
    added = [name for name in after if name not in before]
    biases = [name for name, role in roles.items() if role.part in needed]
    return all(name.endswith(".bias") for name in added) and all(name in after for name in biases)
