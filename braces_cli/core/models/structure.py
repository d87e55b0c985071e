"""Classify modules by structure: projections, activations, token mixers, pairs of projections; hooks on layer outputs.

An FFN works on each token alone. A token mixer (attention, state space, linear attention, short convolution) can have
the same projections and activations, but its `forward` takes a mask, positions or a cache. These arguments distinguish
the two; class names do not.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import CodeType
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

# Parts of names of arguments that hold information about other tokens.
_CONTEXT = ("mask", "position", "cache", "past", "cu_seq")
# Arguments of a kernel for queries, keys and values.
_QUERIES = frozenset({"q", "query", "queries"})
# A container is not an FFN: nn.Sequential would also run an added child.
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
# Activations that `forward` calls as functions leave only their name in its code.
_FUNCTIONS = frozenset({"relu", "silu", "gelu", "sigmoid", "tanh", "elu", "softplus", "leaky_relu", "mish"})
# Modules of the side path that `export code` writes next to an FFN.
SIDE_PATH = ("braces_in", "braces_out")
# Classes in torch's module of activations that are not activations of a neuron.
_NO_ACTIVATION = (nn.MultiheadAttention, nn.Softmax, nn.Softmax2d, nn.LogSoftmax, nn.Softmin)


@dataclass(frozen=True, eq=False)
class Pair:
    """The two ends of an FFN in a layer.

    Attributes:
        name: name of `host` inside the layer, empty for the layer itself.
        host: module that owns both ends, directly or through its children.
        keys: projections that read h: one, or gate and up.
        value: projection that writes the sum of sub-updates.
    """

    name: str
    host: nn.Module
    keys: tuple[nn.Module, ...]
    value: nn.Module

    def is_host_output(self) -> bool:
        """Return whether the host takes h and returns the output of `value` unchanged.

        A norm, a second branch or an active dropout can change that output, and so can a number that the host
        multiplies by (Falcon-H1) or passes to a functional dropout (BLOOM).
        """
        host = self.host
        if any(isinstance(value, float) for value in vars(host).values()) or list(host.parameters(recurse=False)):
            return False
        for child in host.children():
            idle = isinstance(child, nn.Identity) or (isinstance(child, nn.Dropout) and child.p == 0)
            if not (child in self.keys or child is self.value or idle or is_activation(child)):
                return False
        return all(end in set(host.children()) for end in (*self.keys, self.value))


def layer_output(output: Any) -> Tensor:
    """Hidden states in the return value of a decoder layer: a tensor, or a tuple or list that begins with them."""
    hidden: Tensor = output[0] if isinstance(output, tuple | list) else output
    return hidden


def with_layer_output(output: Any, hidden: Tensor) -> Any:
    """Return value of a decoder layer with other hidden states."""
    if isinstance(output, list):
        return [hidden, *output[1:]]
    if not isinstance(output, tuple):
        return hidden
    return (hidden, *output[1:]) if type(output) is tuple else type(output)(hidden, *output[1:])


def hooks_changed(model: nn.Module) -> None:
    """Recompile a model with `model.compile()` after hooks were added; torch detects removed hooks only.

    Resets all compiled code of the process. The result of `torch.compile(model)` cannot be found from the model.
    """
    if any(part._compiled_call_impl is not None for part in model.modules()):
        torch.compiler.reset()


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Run a model with `model.compile()` without compilation inside the `with` block, so that hooks can change."""
    compiled = {part: part._compiled_call_impl for part in model.modules() if part._compiled_call_impl is not None}
    try:
        for part in compiled:
            part._compiled_call_impl = None
        yield
    finally:
        for part, call in compiled.items():
            part._compiled_call_impl = call


def add_to_output(
    module: nn.Module, vector: Tensor, select: Callable[[Tensor], Tensor | None] = lambda vector: vector
) -> RemovableHandle:
    """Add a vector to the output of `module` in every forward pass, until the returned handle is removed.

    Args:
        vector: (d,), or (rows, 1, d), one for each row of the batch.
        select: returns what is added in the current pass: the vector, (rows, tokens, d), or None.
    """

    def hook(module: nn.Module, args: tuple, output: Any) -> Any:
        nonlocal vector
        hidden = layer_output(output)
        vector = vector.to(hidden)  # moves it in the first pass only
        added = select(vector)
        if added is None:
            return output
        if added.ndim == 1:
            return with_layer_output(output, hidden + added)
        # OPT flattens rows and tokens before its FFN.
        moved = hidden.reshape(len(added), -1, hidden.shape[-1]) + added
        return with_layer_output(output, moved.reshape(hidden.shape))

    return module.register_forward_hook(hook)


@contextmanager
def only_scored(model: Any, scored: Tensor | None) -> Iterator[None]:
    """Compute the logits of the tokens `scored` (k,) only, (1, k, vocabulary); None: of all tokens.

    A head with another input than (rows, tokens, d) computes all of them.
    """
    if scored is None:
        yield
        return

    def pick(head: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not args or args[0].ndim != 3:
            return None
        hidden = args[0].flatten(0, 1)
        return hidden[scored.to(hidden.device)].unsqueeze(0), *args[1:]

    handle = model.get_output_embeddings().register_forward_pre_hook(pick)
    try:
        yield
    finally:
        handle.remove()


def sizes(module: nn.Module) -> tuple[int, int]:
    """(inputs, outputs) of a linear projection; packed weights have `in_features` and `out_features`, too."""
    part: Any = module
    if hasattr(part, "in_features") and hasattr(part, "out_features"):
        return int(part.in_features), int(part.out_features)
    return int(part.nx), int(part.nf)


def is_linear(module: nn.Module) -> bool:
    """Return whether a module is a projection with one matrix: nn.Linear, a packed one, or Conv1D of GPT-2."""
    if all(hasattr(module, name) for name in ("in_features", "out_features")):
        # Some packings (hqq) do not call their tensor `weight`.
        tensors = (*module.parameters(recurse=False), *module.buffers(recurse=False))
        return isinstance(getattr(module, "weight", None), Tensor) or bool(tensors)
    return isinstance(getattr(module, "weight", None), Tensor) and all(hasattr(module, n) for n in ("nx", "nf"))


def is_activation(value: object) -> bool:
    """Return whether a value is an activation: a module of torch or transformers, or a function of theirs."""
    if isinstance(value, nn.Module):
        home = type(value).__module__
        is_home = home in ("torch.nn.modules.activation", "transformers.activations")
        return is_home and not isinstance(value, _NO_ACTIVATION)
    home = getattr(value, "__module__", "") or ""
    return callable(value) and home in ("torch.nn.functional", "torch._C._nn", "transformers.activations")


def activations(module: nn.Module) -> list[Any]:
    """Activations of `module` as callables: children, attributes, and functions that its `forward` calls."""
    found: list[Any] = [value for value in (*module.children(), *vars(module).values()) if is_activation(value)]
    for child in module.children():
        # Activations in a model's own file hold nothing (BloomGelu).
        content = [*child.children(), *child.parameters(), *child.buffers()]
        if not content and not type(child).__module__.startswith("torch.") and child not in found:
            found.append(child)
    code = _forward_code(module)
    called = () if code is None else sorted(_FUNCTIONS.intersection(code.co_names))
    return found + [getattr(nn.functional, name) for name in called]


def _forward_code(module: nn.Module) -> CodeType | None:
    """Code of the class's `forward` without decorators; accelerate replaces `forward` of the instance."""
    return getattr(inspect.unwrap(type(module).forward), "__code__", None)


def _arguments(module: nn.Module) -> tuple[str, ...]:
    code = _forward_code(module)
    return () if code is None else code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]


def takes_context(module: nn.Module) -> bool:
    """Return whether `forward` takes information about other tokens: a mask, positions, a cache or queries."""
    names = _arguments(module)
    return not _QUERIES.isdisjoint(names) or any(word in name for name in names for word in _CONTEXT)


def takes_cache(module: nn.Module) -> bool:
    """Return whether `forward` takes a cache, as a decoder or a part of one does."""
    return any(word in argument for argument in _arguments(module) for word in ("past", "cache"))


def is_mixer(module: nn.Module) -> bool:
    """Return whether a module mixes tokens: no part of it takes the context that it takes, or it has a convolution."""
    if any(isinstance(child, nn.Conv1d) for child in module.children()):
        return True
    return takes_context(module) and not any(takes_context(part) for part in module.modules() if part is not module)


def outside_mixers(layer: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of `layer` and its parts, without mixers, norms and their parts.

    AXK2 gates each norm by a small network with the structure of an FFN. Only the class name identifies a norm.
    """
    yield prefix, layer
    for name, child in layer.named_children():
        if not is_mixer(child) and "norm" not in type(child).__name__.lower():
            yield from outside_mixers(child, f"{prefix}.{name}" if prefix else name)


def _pair(name: str, host: nn.Module) -> Pair | None:
    """Pair of projections of `host` around an activation; its value is the last projection that fits a key."""
    # Projections of the host and of its children (BERT's intermediate and output), each with its owner.
    owners: dict[nn.Module, nn.Module] = {}
    for child_name, child in host.named_children():
        if child_name in SIDE_PATH:
            continue
        if is_linear(child):
            owners[child] = host
        elif not takes_context(child):
            owners.update((part, child) for part in child.children() if is_linear(part))
    for value in reversed(owners):
        d_ff, d = sizes(value)
        keys = tuple(m for m in owners if m is not value and sizes(m) in ((d, d_ff), (d, 2 * d_ff)))
        around = {host, *(owners[end] for end in (*keys, value))}
        if keys and any(map(activations, around)):
            return Pair(name, host, keys, value)
    return None


def pairs(layer: nn.Module) -> list[Pair]:
    """Pairs of a layer in the order of its modules: none, one, or several in a mixture of experts.

    The layer is the host if both ends are its children or in two of its children (OPT, BERT).
    """
    found: dict[nn.Module, Pair] = {}
    for name, host in outside_mixers(layer):
        # xLSTM's cell is a part that only mixes tokens.
        mixes = takes_context(host) or any(map(is_mixer, host.children()))
        if isinstance(host, _CONTAINERS) or (host is not layer and mixes):
            continue
        pair = _pair(name, host)
        if pair:
            found[pair.value] = pair  # the deepest host comes last
    wide = [pair for pair in found.values() if sizes(pair.value)[0] >= sizes(pair.value)[1]]
    # A pair narrower than the model is a low-rank adapter next to the FFN: language adapters of X-MOD, per-layer
    # embeddings of Gemma 3n and 4.
    return wide or list(found.values())


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
    found: dict[int, tuple[str, torch.Size]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        found.setdefault(id(tensor), (name, tensor.shape))
    return dict(found.values())
