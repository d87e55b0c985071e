"""Find the feed-forward layers of a causal language model by their structure.

A feed-forward network (FFN) is a pair of projections around an activation:

    h --key--> d_ff neurons --activation--> w --value--> sum_j w_j v_j

`key` is one projection (GPT-2), two (gate and up, Llama) or one fused of width 2 d_ff (Phi-3); `value` maps
d_ff back to d, and its columns are the value vectors. Nothing here knows a model by name: what is looked for is
a module that owns an activation and such a pair among its direct children, inside a stack of layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from braces_cli.core.errors import ConfigError, ModelError
from braces_cli.core.values import Values, dense, stored_values

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
    def hidden_size(self) -> int:
        """d, the width of `h` and of a value vector."""
        return _sizes(self.value)[1]

    @property
    def value_vectors(self) -> int:
        """d_ff, the number of value vectors."""
        return _sizes(self.value)[0]

    def values(self) -> Values:
        """W_V for products: a view of the model's own weight, or what unpacks it where there is none to view."""
        return stored_values(self.value)

    def value_matrix(self) -> Tensor:
        """W_V (d, d_ff): column j is the value vector v_j. A view of the model's own weight where that is a plain
        tensor, else (packed, offloaded) a copy, which whoever asked for it should not keep."""
        return dense(self.values())

    def value_path(self, model: nn.Module) -> str:
        """Full name of the value projection inside `model`."""
        return next(name for name, module in model.named_modules() if module is self.value)


def _sizes(module: nn.Module) -> tuple[int, int]:
    """(inputs, outputs) of a linear projection. `in_features` and `out_features` are there for packed weights too."""
    part: Any = module
    if hasattr(part, "in_features") and hasattr(part, "out_features"):
        return int(part.in_features), int(part.out_features)
    return int(part.nx), int(part.nf)


def _is_linear(module: nn.Module) -> bool:
    """A linear projection, packed or not: some packings (hqq) hold their numbers under another name than `weight`."""
    if all(hasattr(module, name) for name in ("in_features", "out_features")):
        own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
        return isinstance(getattr(module, "weight", None), Tensor) or bool(own)
    return isinstance(getattr(module, "weight", None), Tensor) and all(hasattr(module, n) for n in ("nx", "nf"))


def _is_activation(value: object) -> bool:
    """Activation modules of torch and transformers, and the plain functions some models hold as attributes."""
    home = getattr(type(value) if isinstance(value, nn.Module) else value, "__module__", "") or ""
    if isinstance(value, nn.Module):
        return home in ("torch.nn.modules.activation", "transformers.activations")
    return callable(value) and home in ("torch.nn.functional", "torch._C._nn")


def _has_activation(module: nn.Module) -> bool:
    return any(map(_is_activation, module.children())) or any(map(_is_activation, vars(module).values()))


def _mixes_tokens(host: nn.Module) -> bool:
    """A state-space mixer (Mamba) has an activation between two projections, too; its convolution and its own state
    parameters tell that it is no FFN."""
    own = any(True for _ in host.parameters(recurse=False))
    return own or any(isinstance(child, nn.Conv1d) for child in host.children())


def _pair(host: nn.Module) -> tuple[tuple[nn.Module, ...], nn.Module] | None:
    """The (keys, value) among the direct children of `host`, or None."""
    linears = [child for child in host.children() if _is_linear(child)]
    for value in reversed(linears):
        d_ff, d = _sizes(value)
        keys = tuple(m for m in linears if m is not value and _sizes(m) in ((d, d_ff), (d, 2 * d_ff)))
        if keys:
            return keys, value
    return None


def _is_whole(host: nn.Module, keys: tuple[nn.Module, ...], value: nn.Module) -> bool:
    """Nothing in `host` can stand between it and the two ends of the pair.

    An active dropout can: the paper's sum is what leaves `value`, so the term must be added before it.
    """
    for child in host.children():
        idle = isinstance(child, nn.Identity) or (isinstance(child, nn.Dropout) and child.p == 0)
        if not (child in keys or child is value or idle or _is_activation(child)):
            return False
    return True


def layer_stack(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and ModuleList of the decoder layers: the outermost list whose layers hold the most FFNs.

    Raises:
        ModelError: the model has no list of layers.
    """
    best: tuple[int, str, nn.ModuleList] | None = None
    inside: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(name.startswith(f"{outer}.") for outer in inside):
            continue
        inside.append(name)
        count = sum(1 for layer in module if any(True for _ in _pairs(layer)))
        # Not strictly greater: in an encoder-decoder model the decoder, which comes second, is the one that generates.
        if best is None or count >= best[0]:
            best = (count, name, module)
    if best is None:
        raise ModelError(
            f"{type(model).__name__} has no list of layers",
            hint=f"braces looked for {_LOOKED_FOR}; a model without feed-forward layers has nothing to attach to.",
        )
    return best[1], best[2]


def _pairs(layer: nn.Module) -> Iterator[tuple[str, nn.Module, tuple[nn.Module, ...], nn.Module]]:
    for name, host in layer.named_modules():
        if _has_activation(host) and not _mixes_tokens(host):
            pair = _pair(host)
            if pair:
                yield name, host, *pair


def _experts(layer: nn.Module) -> str | None:
    """What shows that this layer mixes experts, or None. Attaching to one part of a mixture would be silently wrong."""
    for name, parameter in layer.named_parameters():
        if parameter.ndim == 3 and min(parameter.shape) > 1 and "conv" not in name:
            return f"{name} {tuple(parameter.shape)}"
    pairs = [name for name, *_ in _pairs(layer)]
    return ", ".join(pairs[:3]) if len(pairs) > 1 else None


def find_ffns(model: nn.Module) -> list[FFN]:
    """Every feed-forward layer of the decoder, in order.

    Raises:
        ModelError: no layer has a recognisable FFN, or a layer mixes several experts.
    """
    stack_name, stack = layer_stack(model)
    found: list[FFN] = []
    for index, layer in enumerate(stack):
        experts = _experts(layer)
        if experts:
            raise ModelError(
                f"layer {index} of {type(model).__name__} is a mixture of experts ({experts})",
                hint="braces attaches to models with one feed-forward network a layer.",
            )
        for name, host, keys, value in _pairs(layer):
            path = ".".join(part for part in (stack_name, str(index), name) if part)
            found.append(FFN(index, path, host, keys, value, host is not layer and _is_whole(host, keys, value)))
    if not found:
        inside = sorted({type(module).__name__ for module in stack[0].modules()}) if len(stack) else []
        raise ModelError(
            f"no feed-forward layer found in {type(model).__name__}",
            hint=f"Looked for {_LOOKED_FOR}; {stack_name}.0 holds: {', '.join(inside)}.",
        )
    return found


def parse_ranges(text: str, count: int, option: str) -> list[int]:
    """Indices of `8-20,24` or `1-` (inclusive, from 0) among `count`, in order.

    Raises:
        ConfigError: not a list of ranges, or beyond what there is.
    """
    chosen: set[int] = set()
    for part in (part.strip() for part in text.split(",")):
        first, dash, last = part.partition("-")
        if not first.isdigit() or (last and not last.isdigit()):
            raise ConfigError(f"`{part}` is no number and no range", where=option, hint="Such as 8-20,24 or 1-.")
        low = int(first)
        high = (int(last) if last else count - 1) if dash else low
        if low > high or high >= count:
            raise ConfigError(f"`{part}` is out of range", where=option, hint=f"There is 0 to {count - 1}.")
        chosen.update(range(low, high + 1))
    return sorted(chosen)


def chosen_layers(model: nn.Module, text: str | None) -> list[int] | None:
    """Decoder layers of a `--layers` option; None, which is all, where it was not given."""
    return None if text is None else parse_ranges(text, len(layer_stack(model)[1]), "--layers")


def parameter_total(model: nn.Module) -> int:
    """Number of parameters, tied ones once; of those packed two to a byte (bitsandbytes 4-bit), what they stand for."""
    states = ((p, getattr(p, "quant_state", None)) for p in model.parameters())
    return sum(p.numel() if state is None else state.shape.numel() for p, state in states)
