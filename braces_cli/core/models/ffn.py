"""Find the feed-forward networks (FFNs) of a causal language model by structure, dense or mixtures of experts.

    h --key--> d_ff neurons --activation--> w --value--> sum_j w_j v_j

`key` is one projection (GPT-2), two (gate and up, Llama) or one fused of width 2 d_ff (Phi-3); `value` maps d_ff back
to d, and its columns are the value vectors v_j. In a mixture of experts all parts of a layer share one R and one gate:

    sum_e p_e FFN_e(h)  ->  sum_e p_e (FFN_e(h) + B_e (A h) + s B_e (A h_c)),    B_e = g c / sqrt(d_r) W_e W_e^T R^T
"""

from __future__ import annotations

import inspect
import posixpath
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from braces_cli.core.config import parse_ranges
from braces_cli.core.errors import ConfigError, ModelError
from braces_cli.core.models.identity import sampled_entries
from braces_cli.core.models.structure import layer_output, outside_mixers, pairs, sizes, takes_cache
from braces_cli.core.models.weights import Values, dense, stored_bias, stored_values

# Model types on which an adapter would be wrong without an error.
_REFUSED = {
    "hrm_text": "its layers are in two lists",
    "reformer": "its layers run where autograd does not record them",
    "xlnet": "it runs tokens before rows, and a batch may hold rows of different strengths",
}
_EXPECTED = "a module with an activation and two linear projections d -> d_ff -> d in each layer"


@dataclass(frozen=True, eq=False)
class FFN:
    """One dense FFN: that of a layer, or an expert that is a module.

    Attributes:
        layer: index in the stack of decoder layers, from 0.
        path: name of `host` inside the model.
        host: module that owns the pair: the FFN (LlamaMLP), or the decoder layer if there is no such module (OPT).
        keys: projections that read `h`; several if there is a gate.
        value: projection that writes the sum of sub-updates.
        is_host_output: `host` takes `h` and returns the output of `value`, so that one hook is enough.
    """

    layer: int
    path: str
    host: nn.Module
    keys: tuple[nn.Module, ...]
    value: nn.Module
    is_host_output: bool

    @property
    def parts(self) -> tuple[FFN, ...]:
        """The FFN itself; a `MixtureFFN` has several parts."""
        return (self,)

    @property
    def output_module(self) -> nn.Module:
        """Module whose output is the FFN output."""
        return self.value

    @property
    def hidden_size(self) -> int:
        """d, the width of `h` and of a value vector."""
        return sizes(self.value)[1]

    @property
    def value_vectors(self) -> int:
        """d_ff, the number of value vectors."""
        return sizes(self.value)[0]

    def values(self) -> Values:
        """W_V for products: a view of the weight, or a `StoredValues` that unpacks it."""
        return stored_values(self.value)

    def value_matrix(self) -> Tensor:
        """W_V (d, d_ff) with the value vectors as columns: a view of the weight, or a temporary dense copy."""
        return dense(self.values())

    def bias(self) -> Tensor | None:
        """Bias of the value projection (d,), not a copy unless it is offloaded; None without a bias."""
        return stored_bias(self.value)

    @cached_property
    def samples(self) -> Tensor:
        """Samples of W_V that identify the base; see `core.models.identity`."""
        return sampled_entries(self.parts)

    def watch(self, callback: Callable[[Tensor], None]) -> RemovableHandle:
        """Call `callback` with the FFN's input in every forward pass, until the returned handle is removed."""
        return self.keys[0].register_forward_pre_hook(lambda module, args: callback(args[0]))


@dataclass(frozen=True, eq=False)
class Experts:
    """Routed experts whose weights are slices of one 3-D tensor.

    Attributes:
        module: called with `(h, index, weights)`: tokens (n, d), experts of each (n, k) and their p_e (n, k); or with
            `(h)` alone, tokens sorted by expert (experts * n, d) and multiplied by p_e before (Llama 4).
        name: name of the value weight in the module.
        transposed: the weight is stored as (experts, d_ff, d), not (experts, d, d_ff).
        presorted: the module is called with `(h)` alone.
    """

    module: nn.Module
    name: str
    transposed: bool
    presorted: bool

    @property
    def hidden_size(self) -> int:
        """d, the width of `h` and of a value vector."""
        return int(self.value_matrix().shape[1])

    @property
    def value_vectors(self) -> int:
        """Number of value vectors of all experts together."""
        return self.value_matrix()[:, 0].numel()

    def value_matrix(self) -> Tensor:
        """W_V of every expert, (experts, d, d_ff), a view of the weight."""
        weight: Any = getattr(self.module, self.name)
        return cast("Tensor", weight.mT if self.transposed else weight)

    def values(self) -> Tensor:
        """W_V for products; stacked experts are never packed."""
        return self.value_matrix()

    def bias(self) -> Tensor | None:
        """Bias of each expert's value projection, (experts, d); None without a bias."""
        return getattr(self.module, f"{self.name}_bias", None)


@dataclass(frozen=True, eq=False)
class MixtureFFN:
    """The FFN of a decoder layer with experts.

    Attributes:
        layer: index in the stack of decoder layers, from 0.
        path: name of `host` inside the model.
        host: module that holds all parts.
        parts: `Experts`, and an `FFN` for each routed or shared expert that is a module.
    """

    layer: int
    path: str
    host: nn.Module
    parts: tuple[Any, ...]

    @property
    def output_module(self) -> nn.Module:
        """Module whose output is the FFN output, shared experts included."""
        return self.host

    @property
    def hidden_size(self) -> int:
        """d, the width of `h` and of a value vector."""
        return int(self.parts[0].hidden_size)

    @property
    def value_vectors(self) -> int:
        """Number of value vectors of all experts together."""
        return sum(part.value_vectors for part in self.parts)

    @cached_property
    def samples(self) -> Tensor:
        """Samples of W_V that identify the base; see `core.models.identity`."""
        return sampled_entries(self.parts)

    def value_matrix(self) -> Tensor:
        """W_V of all experts, (d, value_vectors): a copy, for inspection only."""
        blocks = [part.value_matrix() for part in self.parts]
        return torch.cat([b if b.ndim == 2 else b.transpose(0, 1).flatten(1) for b in blocks], dim=1)

    def watch(self, callback: Callable[[Tensor], None]) -> RemovableHandle:
        """Call `callback` with the layer's input in every forward pass, until the returned handle is removed."""

        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            callback(args[0] if args else next(iter(kwargs.values())))

        # Experts get each token once and unchanged, unless they are presorted.
        plain = [part.module for part in self.parts if isinstance(part, Experts) and not part.presorted]
        return (plain or [self.host])[0].register_forward_pre_hook(hook, with_kwargs=True)


def watch_output(ffn: FFN | MixtureFFN, callback: Callable[[Tensor], None]) -> RemovableHandle:
    """Call `callback` with the FFN's output, before other hooks change it, until the returned handle is removed."""
    return ffn.output_module.register_forward_hook(
        lambda module, args, output: callback(layer_output(output)), prepend=True
    )


def layer_stack(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and ModuleList of the decoder layers: of the outermost lists, the one with the most layers that have an FFN.

    Vision and audio towers are left out. The last of equal lists is returned: in an encoder-decoder model the decoder,
    which generates, comes second.
    """
    embed: Any = getattr(model, "get_input_embeddings", None)
    embedding = embed() if embed else None
    found: list[tuple[int, str, nn.ModuleList]] = []
    closed: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(f"{outer}.") for outer in closed):
            continue
        # A vision or audio tower is a model that neither embeds tokens nor has a cache of them.
        is_model = hasattr(module, "main_input_name")
        if name and is_model and embedding not in module.modules() and not takes_cache(module):
            closed.append(name)
        elif isinstance(module, nn.ModuleList):
            closed.append(name)
            with_ffn = (pairs(layer) or any(_stacked(part) for _, part in outside_mixers(layer)) for layer in module)
            found.append((sum(map(bool, with_ffn)), name, module))
    if not found:
        hint = f"braces looked for {_EXPECTED}; a model without feed-forward layers cannot have an adapter."
        raise ModelError(f"{type(model).__name__} has no list of layers", hint=hint)
    _, name, stack = max(reversed(found), key=lambda entry: entry[0])
    return name, stack


def chosen_layers(model: nn.Module, text: str | None) -> list[int] | None:
    """Decoder layers of a `--layers` option; None, which means all, if the option is not set."""
    return None if text is None else parse_ranges(text, len(layer_stack(model)[1]), "--layers")


def find_ffns(model: nn.Module) -> list[FFN | MixtureFFN]:
    """FFN of every decoder layer that has one, in order.

    Raises:
        ModelError: no FFN is found, the layout of a mixture of experts is unknown, or the model type is refused.
    """
    config: Any = getattr(model, "config", None)
    if config is not None and config.model_type in _REFUSED:
        reason = _REFUSED[config.model_type]
        raise ModelError(f"models of type `{config.model_type}` are not supported: {reason}", hint="Use another base.")
    # No expert weight has width 0, so a model without a config cannot have stacked experts.
    width = int(getattr(config.get_text_config(), "hidden_size", 0)) if config is not None else 0
    stack_name, stack = layer_stack(model)
    found: list[FFN | MixtureFFN] = []
    seen: set[nn.Module] = set()
    for index, layer in enumerate(stack):
        prefix = f"{stack_name}.{index}"
        modules = {
            pair.name: FFN(
                index,
                f"{prefix}.{pair.name}".rstrip("."),
                pair.host,
                pair.keys,
                pair.value,
                pair.host is not layer and pair.is_host_output(),
            )
            for pair in pairs(layer)
            if pair.value not in seen  # layers may share a module: it is one FFN, of the first of these layers
        }
        seen.update(ffn.value for ffn in modules.values())
        stacked = {
            name: Experts(module, *_value_weight(module, width), _is_presorted(module))
            for name, module in outside_mixers(layer)
            if _stacked(module)
        }
        if stacked:
            modules = {name: ffn for name, ffn in modules.items() if _is_expert(name, ffn, list(stacked), width)}
        if len(modules) == 1 and not stacked:
            found.extend(modules.values())
        elif modules or stacked:
            host = _common_parent(layer, [*modules, *(name.rpartition(".")[0] for name in stacked)])
            parts: tuple[FFN | Experts, ...] = (*stacked.values(), *modules.values())
            found.append(MixtureFFN(index, f"{prefix}.{host}".rstrip("."), layer.get_submodule(host), parts))
    if not found:
        inside = sorted({type(module).__name__ for module in stack[0].modules()}) if len(stack) else []
        raise ModelError(
            f"{type(model).__name__} has no feed-forward layer, and braces attaches to nothing else",
            hint=f"Looked for {_EXPECTED}; {stack_name}.{len(stack) - 1} holds: {', '.join(inside)}.",
        )
    return found


def choose_ffns(ffns: Sequence[FFN | MixtureFFN], rank: int, layers: Sequence[int] | None) -> list[FFN | MixtureFFN]:
    """FFNs of `layers`, or all FFNs, for an adapter of rank `rank`.

    Raises:
        ConfigError: rank below 1 or above the hidden size, or a layer without an FFN.
    """
    known = [ffn.layer for ffn in ffns]
    requested = known if layers is None else list(layers)
    missing = sorted(set(requested) - set(known))
    if missing or not requested:
        raise ConfigError(f"no feed-forward layer in layers {missing}", hint=f"Layers {known} have one.")
    chosen = [ffn for ffn in ffns if ffn.layer in set(requested)]
    width = min(ffn.hidden_size for ffn in chosen)
    if not 1 <= rank <= width:
        raise ConfigError(f"rank {rank} does not fit hidden size {width}", where="--rank", hint=f"Use 1 to {width}.")
    return chosen


def _is_expert(name: str, ffn: FFN, stacked: list[str], width: int) -> bool:
    """Return whether an FFN next to stacked experts is an expert, not a part of a router, norm or mixer.

    An expert has the width of the model, and is in the block of the stacked experts or a child of the layer.
    """
    blocks = [path.rpartition(".")[0] for path in stacked]
    inside = any(not block or name == block or name.startswith(f"{block}.") for block in blocks)
    return ffn.hidden_size == width and (inside or "." not in name)


def _common_parent(layer: nn.Module, names: list[str]) -> str:
    """Name of the innermost module of `layer` that holds all of `names` and has a `forward`."""
    common = posixpath.commonpath([name.replace(".", "/") for name in names]).split("/")
    while common and isinstance(layer.get_submodule(".".join(common)), nn.ModuleList):
        common.pop()
    return ".".join(common)


def _stacked(module: nn.Module) -> dict[str, nn.Parameter]:
    """3-D weights of a module, which can be stacked experts; the kernel of a convolution cannot."""
    if isinstance(module, nn.Conv1d):
        return {}
    return {name: p for name, p in module.named_parameters(recurse=False) if p.ndim == 3 and min(p.shape) > 1}


def _value_weight(module: nn.Module, d: int) -> tuple[str, bool]:
    """Name of the 3-D weight that writes to the residual stream, and whether it is stored transposed.

    Its d_ff is that of the other weights, or half of it if gate and up are fused.
    """
    if getattr(module, "has_post_expert_norm", False):
        message = f"{type(module).__name__} normalises the output of each expert"
        raise ModelError(message, hint="The method does not cover a norm after the value vectors.")
    stacked = _stacked(module)
    for name in reversed(stacked):  # the value weight is registered last
        others = [p.shape[1:] for other, p in stacked.items() if other != name]
        for transposed in (False, True):
            a, b = stacked[name].shape[1:]
            d_out, d_ff = (b, a) if transposed else (a, b)
            expected = {(d, d_ff), (d, 2 * d_ff)} if transposed else {(d_ff, d), (2 * d_ff, d)}
            fits = d_out == d and bool(others) and all(tuple(shape) in expected for shape in others)
            # If d = d_ff the sizes are ambiguous; transformers' experts then have `is_transposed`.
            if fits and getattr(module, "is_transposed", transposed) == transposed:
                return name, transposed
    found = ", ".join(f"{name} {tuple(p.shape)}" for name, p in stacked.items())
    message = f"{type(module).__name__} holds experts in a layout that is not understood ({found})"
    hint = f"Looked for a weight (experts, {d}, d_ff) and ones that read as much, or their transposes."
    raise ModelError(message, hint=hint)


def _is_presorted(module: nn.Module) -> bool:
    """Return whether the module is called with tokens alone.

    transformers wraps the forward of experts that take `(h, index, weights)` and marks them with `has_gate`. For other
    modules the named inputs of `forward` are counted, of a base class if the module's own passes on `*args`.
    """
    if hasattr(module, "has_gate"):
        return False
    classes = [kind for kind in type(module).__mro__ if kind is not nn.Module and "forward" in vars(kind)]
    count = 0
    for function in (module.forward, *(vars(kind)["forward"] for kind in classes)):
        spec = inspect.getfullargspec(function)
        if spec.varargs is None and (named := {*spec.args, *spec.kwonlyargs} - {"self"}):
            count = len(named)
            break
    if count in (1, 3):
        return count == 1
    message = f"{type(module).__name__} is called with {count} tensors"
    raise ModelError(message, hint="Looked for tokens alone, or tokens, experts and their weights.")


def routing(args: tuple, kwargs: dict) -> tuple[Tensor, Tensor, Tensor]:
    """(h (n, d), experts of each token (n, k), their p_e (n, k)) of a call `(h, index, weights)`.

    With expert parallelism, experts of other processes have an index past the last.
    """
    h, first, second = [*args, *kwargs.values()][:3]
    index, weights = (second, first) if first.is_floating_point() else (first, second)
    h = h.reshape(-1, h.shape[-1])
    index = index.reshape(len(h), -1)
    weights = weights.reshape(len(h), -1)
    if weights.shape[1] != index.shape[1]:
        weights = weights.gather(1, index)
    return h, index, weights


def expert_outputs(module: Any, args: tuple, kwargs: dict, index: Tensor) -> Tensor:
    """Outputs (n, k, d) of experts `index` (n, k) for the tokens of a call `(h, index, weights)`, before the weights.

    Runs each expert once more; differentiable.
    """
    inputs = [*args, *kwargs.values()]
    place = 2 if inputs[2].is_floating_point() else 1
    h, weights, sent = inputs[0], inputs[place], inputs[3 - place]
    # Each pair of a token and an expert becomes a token that is sent to this expert alone, with weight 1. LongCat-Flash
    # needs two experts for each token: the second one is the same, with weight 0.
    column = index.reshape(-1, 1).expand(-1, 2 if hasattr(module, "zero_expert_num") else 1)
    if weights.numel() == sent.numel():
        ones = weights.new_zeros(column.shape)
        ones[:, 0] = 1.0
    else:
        ones = weights.new_zeros(len(column), weights.shape[-1]).scatter(1, column, 1.0)
    inputs[0] = h.repeat_interleave(index.shape[1], dim=-2)
    inputs[place] = ones.reshape(*weights.shape[:-2], -1, ones.shape[1])
    inputs[3 - place] = column.to(sent.dtype).reshape(*sent.shape[:-2], -1, column.shape[1])
    # `forward`, because this function may be called from a hook of the module.
    output: Tensor = module.forward(*inputs[: len(args)], **dict(zip(kwargs, inputs[len(args) :], strict=True)))
    return output.reshape(*index.shape, h.shape[-1])


def parameter_total(model: nn.Module) -> int:
    """Number of parameters, tied ones once; weights packed two to a byte (bitsandbytes 4-bit) count unpacked."""
    states = ((p, getattr(p, "quant_state", None)) for p in model.parameters())
    return sum(p.numel() if state is None else state.shape.numel() for p, state in states)
