"""Mixtures of experts: the feed-forward layer of a decoder layer as several parts that share one R and one gate.

    sum_e p_e FFN_e(h)   ->   sum_e p_e (FFN_e(h) + B_e (A h) + s B_e (A h_c)),    B_e = g / sqrt(d_r) W_e W_e^T R^T

Experts that are modules of their own, routed or shared, are ordinary feed-forward networks (`ffn.FFN`): the term joins
what leaves their value projection, so the model weighs it as it weighs the expert. Experts that are slices of one 3-D
weight have no such place; `Experts` describes the module that holds them, and the term is weighed here.

Find the feed-forward layers of a causal language model by their structure.

A feed-forward network (FFN) is a pair of projections around an activation:

    h --key--> d_ff neurons --activation--> w --value--> sum_j w_j v_j

`key` is one projection (GPT-2), two (gate and up, Llama) or one fused of width 2 d_ff (Phi-3); `value` maps
d_ff back to d, and its columns are the value vectors. Nothing here knows a model by name: what is looked for is
a module that owns an activation and such a pair among its direct children, inside a stack of layers.

How the output of an FFN joins the residual stream, measured by adding to it.

In most models what leaves the FFN is added unchanged, in some (Granite) times a constant; in others a norm is between
(Gemma 2) or behind the sum (BERT). Only in the first two kinds does a vector added to the FFN output move the layer's
output by a multiple of that vector.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from braces_cli.core.config import parse_ranges
from braces_cli.core.errors import ModelError
from braces_cli.core.models.structure import (
    is_whole,
    keeps_state,
    layer_output,
    outside_mixers,
    pairs,
    sizes,
    with_layer_output,
)
from braces_cli.core.models.weights import Values, dense, stored_values


@dataclass(frozen=True, eq=False)
class Experts:
    """Routed experts whose weights are slices of one 3-D tensor.

    Attributes:
        path: name of `module` inside the model.
        module: takes `(h, index, weights)`: tokens (n, d), experts of each (n, k) and their p_e (n, k); or `(h)` alone,
            tokens sorted by expert (experts * n, d), scaled by the router before they enter (Llama 4).
        name: the value weight among the module's parameters.
        transposed: it is stored as (experts, d_ff, d) rather than (experts, d, d_ff).
        sorted: the module takes `(h)` alone.
    """

    path: str
    module: nn.Module
    name: str
    transposed: bool
    sorted: bool

    def value_matrix(self) -> Tensor:
        """W_V of every expert, (experts, d, d_ff), a view of the model's own weight."""
        weight: Any = getattr(self.module, self.name)
        return cast("Tensor", weight.mT if self.transposed else weight)

    def values(self) -> Tensor:
        """The same, as `ffn.FFN` calls what products are made with; stacked experts are never packed."""
        return self.value_matrix()

    def value_path(self, model: nn.Module) -> str:
        """Full name of the value weight inside `model`."""
        return f"{self.path}.{self.name}"


@dataclass(frozen=True, eq=False)
class MixtureFFN:
    """The feed-forward layer of one decoder layer where it is made of experts.

    Attributes:
        layer: index in the stack of decoder layers, from 0.
        path: name of `host` inside the model.
        host: the module that holds all parts.
        parts: `Experts`, and an `ffn.FFN` for each expert, routed or shared, that is a module of its own.
    """

    layer: int
    path: str
    host: nn.Module
    parts: tuple[Any, ...]

    @property
    def hidden_size(self) -> int:
        """d, the width of `h` and of a value vector."""
        first = self.parts[0]
        return int(first.value_matrix().shape[-2]) if isinstance(first, Experts) else int(first.hidden_size)

    @property
    def value_vectors(self) -> int:
        """Value vectors of all experts together."""
        return sum(
            part.value_matrix()[..., 0, :].numel() if isinstance(part, Experts) else part.value_vectors
            for part in self.parts
        )

    def value_matrix(self) -> Tensor:
        """W_V of all experts side by side, (d, value_vectors): a copy, for looking inside, not for computing."""
        blocks = [part.value_matrix() for part in self.parts]
        return torch.cat([b if b.ndim == 2 else b.transpose(0, 1).flatten(1) for b in blocks], dim=1)

    def value_path(self, model: nn.Module) -> str:
        """Full name of the first value weight inside `model`."""
        return self.parts[0].value_path(model)

    def watch(self, callback: Callable[[Tensor], None]) -> Any:
        """Call `callback` with what enters the layer at each pass, until the returned handle is removed."""

        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            callback(args[0] if args else next(iter(kwargs.values())))

        # The experts see each token once and as it is, unless the router has scaled it for each of them.
        plain = [part.module for part in self.parts if isinstance(part, Experts) and not part.sorted]
        return (plain or [self.host])[0].register_forward_pre_hook(hook, with_kwargs=True)


def _stacked(module: nn.Module) -> dict[str, nn.Parameter]:
    """3-D weights of a module's own; a convolution's kernel is no stack of experts."""
    if isinstance(module, nn.Conv1d):
        return {}
    return {name: p for name, p in module.named_parameters(recurse=False) if p.ndim == 3 and min(p.shape) > 1}


def has_experts(layer: nn.Module) -> bool:
    """Whether some module of the layer holds experts as 3-D weights."""
    return any(_stacked(module) for _, module in outside_mixers(layer))


def find_experts(layer: nn.Module, hidden_size: int) -> Iterator[tuple[str, nn.Module, str, bool, bool]]:
    """(path, module, value weight, transposed, sorted) of each module in `layer` that holds experts as 3-D weights.

    Raises:
        ModelError: experts are there whose layout, or whose way of being called, is not understood.
    """
    for path, module in outside_mixers(layer):
        stacked = _stacked(module)
        if not stacked:
            _refuse_flat(module)
            continue
        if getattr(module, "has_post_expert_norm", False):
            raise ModelError(
                f"{type(module).__name__} normalises what each expert writes",
                hint="The method does not cover a norm after the value vectors.",
            )
        name, transposed = _value_weight(module, stacked, hidden_size)
        yield path, module, name, transposed, _is_sorted(module)


def _refuse_flat(module: nn.Module) -> None:
    """DBRX stacks its experts in two dimensions; only their number tells. A router has one such weight, not two."""
    for name, count in vars(module).items():
        if name.endswith("num_experts") and isinstance(count, int) and count > 1:
            own = [tuple(p.shape) for p in module.parameters(recurse=False) if p.ndim == 2]
            flat = [shape for shape in own if shape[0] % count == 0 and count not in shape]
            if len(flat) > 1:
                raise ModelError(
                    f"{type(module).__name__} holds experts in a layout that is not understood ({flat})",
                    hint="Looked for one weight (experts, d, d_ff), or a module for each expert.",
                )


def _value_weight(module: nn.Module, stacked: dict[str, nn.Parameter], d: int) -> tuple[str, bool]:
    """Which of the 3-D weights writes to the residual stream, and whether it is stored transposed.

    The value weight is the one whose d_ff is that of the others, or half of it where gate and up are fused.
    """
    for name in reversed(stacked):  # the value weight is registered last
        others = [p.shape[1:] for other, p in stacked.items() if other != name]
        for transposed in (False, True):
            a, b = stacked[name].shape[1:]
            d_out, d_ff = (b, a) if transposed else (a, b)
            expected = {(d, d_ff), (d, 2 * d_ff)} if transposed else {(d_ff, d), (2 * d_ff, d)}
            fits = d_out == d and bool(others) and all(tuple(shape) in expected for shape in others)
            # Where d = d_ff the sizes cannot tell; transformers' experts then say it themselves.
            if fits and getattr(module, "is_transposed", transposed) == transposed:
                return name, transposed
    found = ", ".join(f"{name} {tuple(p.shape)}" for name, p in stacked.items())
    raise ModelError(
        f"{type(module).__name__} holds experts in a layout that is not understood ({found})",
        hint=f"Looked for a weight (experts, {d}, d_ff) and ones that read as much, or their transposes.",
    )


def _is_sorted(module: nn.Module) -> bool:
    """Whether the module is called with tokens alone.

    transformers wraps the forward of experts that take `(h, index, weights)` and marks them with `has_gate`; the
    others are asked for their signature.
    """
    if hasattr(module, "has_gate"):
        return False
    count = _inputs(module)
    if count in (1, 3):
        return count == 1
    raise ModelError(
        f"{type(module).__name__} is called with {count} tensors",
        hint="Looked for tokens alone, or tokens, experts and their weights.",
    )


def _inputs(module: nn.Module) -> int:
    """How many inputs `forward` names; where a class passes on whatever it is given, that of the class it adds to; 0
    where none says."""
    import inspect

    rest = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    classes = [kind for kind in type(module).__mro__ if kind is not nn.Module and "forward" in vars(kind)]
    for function in (module.forward, *(vars(kind)["forward"] for kind in classes)):
        inputs = {name: each.kind for name, each in inspect.signature(function).parameters.items() if name != "self"}
        named = [name for name, kind in inputs.items() if kind not in rest]
        if named and inspect.Parameter.VAR_POSITIONAL not in inputs.values():
            return len(named)
    return 0


def routing(args: tuple, kwargs: dict, experts: int) -> tuple[Tensor, Tensor]:
    """(h (n, d), p (n, experts)) of one call `(h, index, weights)`; p is 0 for experts a token is not sent to."""
    h, first, second = [*args, *kwargs.values()][:3]
    index, weights = (second, first) if first.is_floating_point() else (first, second)
    h = h.reshape(-1, h.shape[-1])
    index = index.reshape(len(h), -1)
    weights = weights.reshape(len(h), -1)
    if weights.shape[1] != index.shape[1]:
        weights = weights.gather(1, index)
    # One column more: expert parallelism marks what other processes compute with an index past the last expert.
    p = weights.new_zeros(len(h), experts + 1).scatter_add(1, index.clamp(max=experts), weights)
    return h, p[:, :experts]


def expert_outputs(module: Any, args: tuple, kwargs: dict, experts: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(expert, its tokens (n, d), its outputs (n, d) before the router's weights) of one call `(h, index, weights)`.

    Runs the experts once more for each of the experts that a token is sent to.
    """
    names, inputs = [*range(len(args)), *kwargs], [*args, *kwargs.values()]
    place = 2 if inputs[2].is_floating_point() else 1
    h, weights, index = inputs[0], inputs[place], inputs[3 - place]
    tokens = h.reshape(-1, h.shape[-1])
    sent = index.reshape(len(tokens), -1)
    wide = weights.numel() != index.numel()
    for slot in range(sent.shape[1]):
        column = sent[:, slot : slot + 1]
        alone = torch.zeros_like(weights).reshape(len(tokens), -1)
        if wide:
            alone.scatter_(1, column, 1.0)
        else:
            alone[:, slot] = 1.0
        inputs[place] = alone.reshape(weights.shape)
        changed = dict(zip(names, inputs, strict=True))
        with torch.no_grad():
            # Not by way of the module's own call, whose hooks may be what calls this.
            output = module.forward(
                *(changed[name] for name in range(len(args))), **{name: changed[name] for name in kwargs}
            )
        output = output.reshape(tokens.shape)
        for expert in range(experts):
            rows = column[:, 0] == expert
            if rows.any():
                yield expert, tokens[rows], output[rows]


# Model types on which an adapter would be attached, and would be wrong without a sign of it.
_REFUSED = {
    "hrm_text": "its layers are in two lists",
    "reformer": "its layers run where autograd does not record them",
    "xlnet": "it runs tokens before rows, and a batch may hold rows of different strengths",
}
_LOOKED_FOR = "a module with an activation and two linear projections d -> d_ff -> d in each layer"


@dataclass(frozen=True, eq=False)
class FFN:
    """One feed-forward layer.

    Attributes:
        layer: index in the stack of decoder layers, from 0.
        path: name of `host` inside the model.
        host: the module that owns the pair: the FFN itself (LlamaMLP) or, where it has none, the decoder layer (OPT).
        keys: the projections that read `h`; more than one where there is a gate.
        value: the projection that writes the sum of sub-updates.
        whole: `host` takes `h` and returns what leaves `value`, so that one hook on it is enough.
    """

    layer: int
    path: str
    host: nn.Module
    keys: tuple[nn.Module, ...]
    value: nn.Module
    whole: bool

    @property
    def parts(self) -> tuple[FFN, ...]:
        """Itself: a mixture of experts (`experts.MixtureFFN`) has several."""
        return (self,)

    @property
    def hidden_size(self) -> int:
        """d, the width of `h` and of a value vector."""
        return sizes(self.value)[1]

    @property
    def value_vectors(self) -> int:
        """d_ff, the number of value vectors."""
        return sizes(self.value)[0]

    def values(self) -> Values:
        """W_V for products: a view of the model's own weight, or what unpacks it where there is none to view."""
        return stored_values(self.value)

    def value_matrix(self) -> Tensor:
        """W_V (d, d_ff): column j is the value vector v_j. A view of the model's own weight where that is a plain
        tensor, else (packed, offloaded) a copy, which whoever asked for it should not keep."""
        return dense(self.values())

    def value_path(self, model: nn.Module) -> str:
        """Full name of the value weight inside `model`."""
        return next(f"{name}.weight" for name, module in model.named_modules() if module is self.value)

    def watch(self, callback: Callable[[Tensor], None]) -> RemovableHandle:
        """Call `callback` with what enters the FFN at each pass, until the returned handle is removed."""
        return self.keys[0].register_forward_pre_hook(lambda module, args: callback(args[0]))


def layer_stack(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and ModuleList of the decoder layers: of the outermost lists, the one whose layers hold the most FFNs.

    Vision and audio towers are left out. Of lists with equally many FFNs the last is taken: in an encoder-decoder model
    the decoder, which generates, comes second.

    Raises:
        ModelError: the model has no list of layers.
    """
    embed: Any = getattr(model, "get_input_embeddings", None)
    embedding = embed() if embed else None
    found: list[tuple[int, str, nn.ModuleList]] = []
    closed: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(f"{outer}.") for outer in closed):
            continue
        if name and _is_tower(module, embedding):
            closed.append(name)
        elif isinstance(module, nn.ModuleList):
            closed.append(name)
            count = sum(bool(pairs(layer) or has_experts(layer)) for layer in module)
            found.append((count, name, module))
    if not found:
        raise ModelError(
            f"{type(model).__name__} has no list of layers",
            hint=f"braces looked for {_LOOKED_FOR}; a model without feed-forward layers has nothing to attach to.",
        )
    _, name, stack = max(reversed(found), key=lambda entry: entry[0])
    return name, stack


def chosen_layers(model: nn.Module, text: str | None) -> list[int] | None:
    """Return the decoder layers of a `--layers` option; None, which means all, without the option."""
    return None if text is None else parse_ranges(text, len(layer_stack(model)[1]), "--layers")


def _is_tower(module: nn.Module, embedding: Any) -> bool:
    """A model inside the model that sees or hears: it neither embeds tokens nor keeps a cache of them."""
    return hasattr(module, "main_input_name") and embedding not in module.modules() and not keeps_state(module)


def find_ffns(model: nn.Module) -> list[FFN | MixtureFFN]:
    """The feed-forward layer of every decoder layer that has one, in order.

    Raises:
        ModelError: no layer has a recognisable FFN, a mixture of experts has an unknown layout, or the model type is
            refused.
    """
    config: Any = getattr(model, "config", None)
    if config is not None and config.model_type in _REFUSED:
        reason = _REFUSED[config.model_type]
        raise ModelError(f"models of type `{config.model_type}` are not supported: {reason}", hint="Use another base.")
    width = _width(model)
    name, stack = layer_stack(model)
    layers = [(f"{name}.{place}", layer) for place, layer in enumerate(stack)]
    found: list[FFN | MixtureFFN] = []
    seen: set[nn.Module] = set()
    for index, (prefix, layer) in enumerate(layers):
        modules = {
            pair.name: FFN(
                index,
                _join(prefix, pair.name),
                pair.host,
                pair.keys,
                pair.value,
                pair.host is not layer and is_whole(pair),
            )
            for pair in pairs(layer)
            if pair.value not in seen  # layers may share one module: it is one FFN, counted where it comes first
        }
        seen.update(ffn.value for ffn in modules.values())
        stacked = {
            name: Experts(_join(prefix, name), module, weight, transposed, by_expert)
            for name, module, weight, transposed, by_expert in find_experts(layer, width)
        }
        if stacked:
            modules = {name: ffn for name, ffn in modules.items() if _is_expert(name, ffn, list(stacked), width)}
        if len(modules) == 1 and not stacked:
            found.extend(modules.values())
        elif modules or stacked:
            place = _holder(layer, [*modules, *(name.rpartition(".")[0] for name in stacked)])
            parts: tuple[FFN | Experts, ...] = (*stacked.values(), *modules.values())
            found.append(MixtureFFN(index, _join(prefix, place), layer.get_submodule(place), parts))
    if not found:
        inside = sorted({type(module).__name__ for module in layers[0][1].modules()}) if layers else []
        raise ModelError(
            f"{type(model).__name__} has no feed-forward layer, and braces attaches to nothing else",
            hint=f"Looked for {_LOOKED_FOR}; {layers[-1][0]} holds: {', '.join(inside)}.",
        )
    return found


def _is_expert(name: str, ffn: FFN, stacked: list[str], width: int) -> bool:
    """Whether an FFN found beside stacked experts is one itself, rather than a part of a router, norm or mixer: it
    writes what the model reads, and stands in their block or in the layer itself."""
    blocks = [path.rpartition(".")[0] for path in stacked]
    inside = any(not block or name == block or name.startswith(f"{block}.") for block in blocks)
    return ffn.hidden_size == width and (inside or "." not in name)


def _join(*names: str) -> str:
    return ".".join(name for name in names if name)


def _width(model: nn.Module) -> int:
    """The model's hidden size; 0 where its config does not say, which no expert weight has."""
    config: Any = getattr(model, "config", None)
    return int(getattr(config.get_text_config(), "hidden_size", 0)) if config is not None else 0


def _holder(layer: nn.Module, names: list[str]) -> str:
    """Name of the innermost module of `layer` that holds all of `names` and is called itself."""
    common: list[str] = []
    for parts in zip(*(name.split(".") for name in names), strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    while common and isinstance(layer.get_submodule(".".join(common)), nn.ModuleList):
        common.pop()
    return ".".join(common)


def parameter_total(model: nn.Module) -> int:
    """Number of parameters, tied ones once; of those packed two to a byte (bitsandbytes 4-bit), what they stand for."""
    states = ((p, getattr(p, "quant_state", None)) for p in model.parameters())
    return sum(p.numel() if state is None else state.shape.numel() for p, state in states)


# How far the movement may be from a multiple of the vector, relative to that multiple: rounding of the residual stream.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2}
_BFLOAT16 = 5e-2
# Nearer to 1 than this, a measured factor is 1.
_ONE = {torch.float64: 1e-3, torch.float32: 1e-3}
_ONE_HALF = 5e-3
# Of `residual_gains`: small enough to be near the beginning of the curve, large enough for half precision.
GAIN_STEP = 0.3


def residual_factors(model: Any, ffns: Sequence[FFN | MixtureFFN], ids: Tensor) -> list[float | None]:
    """What each FFN's output is multiplied by where it joins the residual stream; None where it joins in another way.

    Args:
        ids: tokens to measure with, (1, tokens), on the device of the input embedding.
    """
    # As large as the residual stream, so that neither is lost in the rounding of the other.
    return [_factor(*each) for each in _moved(model, ffns, ids, lambda stream, written: _size(stream))]


def residual_gains(model: Any, ffns: Sequence[FFN | MixtureFFN], ids: Tensor) -> Tensor:
    """How far the residual stream behind each layer moves for a unit that is added to what its FFN writes: (layers,).

    The factor where there is one. Behind a norm a movement grows more slowly than what is added: there it is that of a
    vector of GAIN_STEP times the norm of the FFN's output, drawn at random, the median over the tokens `ids`.
    """
    factors = residual_factors(model, ffns, ids)
    if None not in factors:
        return torch.tensor(factors).abs()
    small = _moved(model, ffns, ids, lambda stream, written: GAIN_STEP * _size(written))
    gains = [
        (moved.float() - plain.float()).norm(dim=-1).median().cpu() / step.norm() if factor is None else abs(factor)
        for factor, (plain, moved, step) in zip(factors, small, strict=True)
    ]
    return torch.tensor([float(gain) for gain in gains])


def _size(states: Tensor) -> float:
    """Root mean square of states."""
    return float(states.float().pow(2).mean().sqrt())


def _moved(
    model: Any, ffns: Sequence[FFN | MixtureFFN], ids: Tensor, size: Callable[[Tensor, Tensor], float]
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """What leaves each layer, what leaves it once a vector was added to what its FFN writes, and that vector.

    The output of the layer is put back each time, so that two passes measure all layers.

    Args:
        size: of a number of the vector, from what leaves the layer and what the FFN writes.
    """
    stack = layer_stack(model)[1]
    steps: dict[int, Tensor] = {}
    plain: dict[int, Tensor] = {}
    written: dict[int, Tensor] = {}
    moved: dict[int, Tensor] = {}

    def keep(found: dict[int, Tensor], layer: int) -> Any:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            found[layer] = layer_output(output).clone()

        return hook

    def push(layer: int) -> Any:
        def hook(module: nn.Module, args: tuple, output: Any) -> Any:
            hidden = layer_output(output)
            return with_layer_output(output, hidden + steps[layer].to(hidden))

        return hook

    def put_back(layer: int) -> Any:
        def hook(module: nn.Module, args: tuple, output: Any) -> Any:
            moved[layer] = layer_output(output)
            return with_layer_output(output, plain[layer])

        return hook

    ends = {ffn.layer: ffn.host if isinstance(ffn, MixtureFFN) else ffn.value for ffn in ffns}
    with torch.no_grad():
        with ExitStack() as handles:
            for layer, end in ends.items():
                handles.callback(end.register_forward_hook(keep(written, layer)).remove)
                handles.callback(stack[layer].register_forward_hook(keep(plain, layer)).remove)
            model(input_ids=ids, use_cache=False)
        noise = torch.randn(ffns[0].hidden_size, generator=torch.Generator().manual_seed(0))
        steps = {layer: noise * size(plain[layer], written[layer]) for layer in ends}
        with ExitStack() as handles:
            for layer, end in ends.items():
                handles.callback(end.register_forward_hook(push(layer)).remove)
                handles.callback(stack[layer].register_forward_hook(put_back(layer)).remove)
            model(input_ids=ids, use_cache=False)
    return [(plain[ffn.layer], moved[ffn.layer], steps[ffn.layer]) for ffn in ffns]


def _factor(plain: Tensor, moved: Tensor, step: Tensor) -> float | None:
    """The c of moved = plain + c step, both (..., d); None where there is no such c, or several streams in one."""
    if plain.shape[-1] != len(step):
        return None
    change = (moved.float() - plain.float()).flatten(0, -2).cpu()
    factor = (change @ step).mean() / (step @ step)
    rest = (change - factor * step).norm(dim=1).max()
    # Not `rest > ...`: NaN must fail.
    if not rest <= _TOLERANCE.get(plain.dtype, _BFLOAT16) * factor.abs() * step.norm():
        return None
    if (factor - 1).abs() < _ONE.get(plain.dtype, _ONE_HALF):
        return 1.0
    exact = round(float(factor), 3)
    return exact if abs(exact - float(factor)) < 1e-4 else float(factor)
