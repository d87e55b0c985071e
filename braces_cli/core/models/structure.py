"""What a module is, told by its structure: projections, activations, mixers of tokens, pairs of projections.

An FFN works on each token alone. What mixes tokens (attention, state spaces, linear attention, short convolutions) can
look much the same from outside, gated projections around an activation included, but it must be told about the other
tokens: its `forward` takes a mask, positions or a cache. That, more than any name, is what tells the two apart.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

# Words in the names of the arguments by which a module learns of other tokens.
_CONTEXT = ("mask", "position", "cache", "past", "cu_seq")
# Arguments of a kernel that works on queries, keys and values.
_QUERIES = frozenset({"q", "query", "queries"})
# Containers hold parts and are no FFN: what runs its children in a row would run anything added to them, too.
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
# Activations called as functions leave no module and no attribute, only their name in the code of `forward`.
_FUNCTIONS = frozenset({"relu", "silu", "gelu", "sigmoid", "tanh", "swish", "elu", "softplus", "leaky_relu", "mish"})
# The side path that `export code` puts beside an FFN is not a part of the FFN.
SIDE_PATH = ("braces_in", "braces_out")
# In torch's module of activations, but no activation of a neuron.
_NO_ACTIVATION = (nn.MultiheadAttention, nn.Softmax, nn.Softmax2d, nn.LogSoftmax, nn.Softmin)


@dataclass(frozen=True, eq=False)
class Pair:
    """The two ends of an FFN, found in a layer.

    Attributes:
        name: of `host` inside the layer, empty for the layer itself.
        host: the module that owns both ends, itself or through its children.
        keys: what reads h: one projection, or gate and up.
        value: what writes the sum of sub-updates.
    """

    name: str
    host: nn.Module
    keys: tuple[nn.Module, ...]
    value: nn.Module


def layer_output(output: Any) -> Tensor:
    """The hidden states in what a decoder layer returned: a tensor, or a tuple or list that begins with them."""
    hidden: Tensor = output[0] if isinstance(output, tuple | list) else output
    return hidden


def with_layer_output(output: Any, hidden: Tensor) -> Any:
    """What a decoder layer returned, its hidden states replaced by `hidden`."""
    if isinstance(output, list):
        return [hidden, *output[1:]]
    if not isinstance(output, tuple):
        return hidden
    # A tuple with names stays one.
    return (hidden, *output[1:]) if type(output) is tuple else type(output)(hidden, *output[1:])


def by_row(states: Tensor, rows: int) -> Tensor:
    """States of a batch as (rows, tokens, d); OPT flattens the first two dimensions before its FFN."""
    return states.reshape(rows, -1, states.shape[-1])


def hooks_changed(model: nn.Module) -> None:
    """To be called where hooks came: a model with `model.compile()` does not look for new ones by itself. That hooks
    have gone it notices.

    All that torch has compiled in this process is compiled anew. What `torch.compile(model)` returns cannot be found
    from the model.
    """
    if any(part._compiled_call_impl is not None for part in model.modules()):
        torch.compiler.reset()


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """A model with `model.compile()` runs as it is written inside the `with` block, where hooks come and go."""
    compiled = {part: part._compiled_call_impl for part in model.modules() if part._compiled_call_impl is not None}
    try:
        for part in compiled:
            part._compiled_call_impl = None
        yield
    finally:
        for part, call in compiled.items():
            part._compiled_call_impl = call


def add_to_output(module: nn.Module, vector: Tensor) -> RemovableHandle:
    """Add a vector to what `module` returns at each pass, until the returned handle is removed.

    Args:
        vector: (d,), or (rows, 1, d), one for each row of the batch.
    """

    def hook(module: nn.Module, args: tuple, output: Any) -> Any:
        nonlocal vector
        hidden = layer_output(output)
        vector = vector.to(hidden)  # once; from then on it is there
        if vector.ndim == 1:
            return with_layer_output(output, hidden + vector)
        moved = by_row(hidden, len(vector)) + vector
        return with_layer_output(output, moved.reshape(hidden.shape))

    return module.register_forward_hook(hook)


def sizes(module: nn.Module) -> tuple[int, int]:
    """(inputs, outputs) of a linear projection. `in_features` and `out_features` are there for packed weights too."""
    part: Any = module
    if hasattr(part, "in_features") and hasattr(part, "out_features"):
        return int(part.in_features), int(part.out_features)
    return int(part.nx), int(part.nf)


def is_linear(module: nn.Module) -> bool:
    """A projection with one matrix: torch's Linear and its packed kin, transformers' Conv1D (GPT-2)."""
    if all(hasattr(module, name) for name in ("in_features", "out_features")):
        # Some packings (hqq) hold their numbers under another name than `weight`.
        own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
        return isinstance(getattr(module, "weight", None), Tensor) or bool(own)
    return isinstance(getattr(module, "weight", None), Tensor) and all(hasattr(module, n) for n in ("nx", "nf"))


def is_activation(value: object) -> bool:
    """Activation modules of torch and transformers, and the plain functions some models hold as attributes."""
    if isinstance(value, nn.Module):
        home = type(value).__module__
        if isinstance(value, _NO_ACTIVATION):
            return False
        return home in ("torch.nn.modules.activation", "transformers.activations")
    home = getattr(value, "__module__", "") or ""
    return callable(value) and home in ("torch.nn.functional", "torch._C._nn", "transformers.activations")


def has_activation(module: nn.Module) -> bool:
    """`module` owns an activation, as a child, as an attribute, or as a function its `forward` calls."""
    if any(map(is_activation, module.children())) or any(map(is_activation, vars(module).values())):
        return True
    # BloomGelu and its like: a class of the model's own file that holds nothing.
    if any(_is_bare(child) for child in module.children()):
        return True
    return bool(_FUNCTIONS.intersection(_forward(module).__code__.co_names))


def activations(module: nn.Module) -> list[Any]:
    """Activations that `module` owns, as things to call: children, attributes, functions that its `forward` names."""
    owned: list[Any] = [child for child in module.children() if is_activation(child) or _is_bare(child)]
    owned += [value for value in vars(module).values() if is_activation(value)]
    named = sorted(_FUNCTIONS.intersection(_forward(module).__code__.co_names))
    return owned + [getattr(nn.functional, name) for name in named if hasattr(nn.functional, name)]


def _is_bare(module: nn.Module) -> bool:
    holds = [*module.children(), *module.parameters(), *module.buffers()]
    return not holds and not type(module).__module__.startswith("torch.")


def _forward(module: nn.Module) -> Any:
    """The function behind `forward`, without decorators. Of the class: accelerate replaces it in the instance."""
    function = inspect.unwrap(type(module).forward)
    # A method without Python code, or none at all (ModuleList), takes nothing and calls nothing.
    return function if hasattr(function, "__code__") else _nothing


def _nothing() -> None: ...


def _arguments(module: nn.Module) -> tuple[str, ...]:
    code = _forward(module).__code__
    return tuple(code.co_varnames[: code.co_argcount + code.co_kwonlyargcount])


def takes_context(module: nn.Module) -> bool:
    """`forward` is told about other tokens: a mask, positions, a cache or queries."""
    names = _arguments(module)
    return not _QUERIES.isdisjoint(names) or any(word in name for name in names for word in _CONTEXT)


def keeps_state(module: nn.Module) -> bool:
    """`forward` takes a cache: a decoder, or a part of one."""
    return any(word in argument for argument in _arguments(module) for word in ("past", "cache"))


def is_mixer(module: nn.Module) -> bool:
    """Attention or one of its replacements: takes context and hands it to none of its parts, or has a convolution
    over tokens of its own."""
    if any(isinstance(child, nn.Conv1d) for child in module.children()):
        return True
    return takes_context(module) and not any(takes_context(part) for part in module.modules() if part is not module)


def _sees_tokens(host: nn.Module) -> bool:
    """Takes context, or has a part that does nothing but mix tokens (xLSTM's cell)."""
    return takes_context(host) or any(map(is_mixer, host.children()))


def outside_mixers(layer: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of `layer` and its parts, mixers and norms and what they hold left out.

    AXK2 gates each norm by a small network that looks like an FFN and, beside narrow experts, is told by nothing else:
    that a class is a norm is said by its name alone, in all of transformers.
    """
    yield prefix, layer
    for name, child in layer.named_children():
        if not is_mixer(child) and "norm" not in type(child).__name__.lower():
            yield from outside_mixers(child, f"{prefix}.{name}" if prefix else name)


def _reach(host: nn.Module) -> dict[nn.Module, nn.Module]:
    """Projections of `host` and of its children (BERT's intermediate and output), each with its owner."""
    found: dict[nn.Module, nn.Module] = {}
    for name, child in host.named_children():
        if name in SIDE_PATH:
            continue
        if is_linear(child):
            found[child] = host
        elif not takes_context(child):
            found.update((part, child) for part in child.children() if is_linear(part))
    return found


def _pair(name: str, host: nn.Module) -> Pair | None:
    """The pair among the projections of `host`: around an activation, the value the last that fits a key."""
    reached = _reach(host)
    for value in reversed(reached):
        d_ff, d = sizes(value)
        keys = tuple(m for m in reached if m is not value and sizes(m) in ((d, d_ff), (d, 2 * d_ff)))
        if keys and any(has_activation(owner) for owner in {host, *(reached[end] for end in (*keys, value))}):
            return Pair(name, host, keys, value)
    return None


def pairs(layer: nn.Module) -> list[Pair]:
    """The pairs of a layer, in the order of its modules: none, one, or several where it mixes experts.

    Where both ends lie in the layer itself or in two of its children (OPT, BERT), the layer is the host.
    """
    found: dict[nn.Module, Pair] = {}
    for name, host in outside_mixers(layer):
        if isinstance(host, _CONTAINERS) or (host is not layer and _sees_tokens(host)):
            continue
        pair = _pair(name, host)
        if pair:
            found[pair.value] = pair  # the deepest host comes last and is the closest
    wide = [pair for pair in found.values() if sizes(pair.value)[0] >= sizes(pair.value)[1]]
    # Beside an FFN, a pair narrower than the model is a low-rank something: X-MOD's language adapters, the way
    # Gemma 3n and 4 mix in their per-layer embeddings.
    return wide or list(found.values())


def is_whole(pair: Pair) -> bool:
    """The host takes h and returns what leaves the value projection: nothing in it can stand between.

    A norm, a second branch or an active dropout can, and so can a number the host multiplies by (Falcon-H1) or gives to
    a functional dropout (BLOOM): the paper's sum is what leaves the value projection.
    """
    host = pair.host
    if any(isinstance(value, float) for value in vars(host).values()) or list(host.parameters(recurse=False)):
        return False
    for child in host.children():
        idle = isinstance(child, nn.Identity) or (isinstance(child, nn.Dropout) and child.p == 0)
        if not (child in pair.keys or child is pair.value or idle or is_activation(child)):
            return False
    return all(end in set(host.children()) for end in (*pair.keys, pair.value))


# Exceptions that model and config classes of transformers raise for a config that they do not accept.
REFUSALS = (
    ValueError, TypeError, LookupError, AttributeError, RuntimeError, AssertionError, ArithmeticError,
    StrictDataclassError,
)  # fmt: skip


def on_meta(kind: type, config: Any) -> Any:
    """Build a model without weights; None if its class does not accept the config."""
    try:
        with torch.device("meta"):
            return kind(config)
    except REFUSALS:
        return None


def tensor_shapes(model: Any) -> dict[str, torch.Size]:
    """Shapes of the tensors in a checkpoint of `model`; a tied tensor is listed once, under its first name."""
    shapes: dict[str, torch.Size] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            shapes[name] = tensor.shape
    return shapes
