"""Find the feed-forward layers of a causal language model by their structure.

A feed-forward network (FFN) is a pair of projections around an activation:

    h --key--> d_ff neurons --activation--> w --value--> sum_j w_j v_j

`key` is one projection (GPT-2), two (gate and up, Llama) or one fused of width 2 d_ff (Phi-3); `value` maps
d_ff back to d, and its columns are the value vectors. Nothing here knows a model by name: what is looked for is
a module that owns an activation and such a pair among its direct children, inside a stack of layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from braces_cli.core.errors import ConfigError, ModelError
from braces_cli.core.experts import Experts, MixtureFFN, find_experts, has_experts

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
        return _sizes(self.value)[1]

    @property
    def value_vectors(self) -> int:
        """d_ff, the number of value vectors."""
        return _sizes(self.value)[0]

    def value_matrix(self) -> Tensor:
        """W_V as a (d, d_ff) view of the model's own weight: column j is the value vector v_j."""
        return _matrix(self.value)

    def value_path(self, model: nn.Module) -> str:
        """Full name of the value weight inside `model`."""
        return next(f"{name}.weight" for name, module in model.named_modules() if module is self.value)

    def watch(self, callback: Callable[[Tensor], None]) -> RemovableHandle:
        """Call `callback` with what enters the FFN at each pass, until the returned handle is removed."""
        return self.keys[0].register_forward_pre_hook(lambda module, args: callback(args[0]))


def _sizes(module: nn.Module) -> tuple[int, int]:
    """(inputs, outputs) of a linear projection. `in_features` and `out_features` are there for packed weights too."""
    part: Any = module
    if hasattr(part, "in_features") and hasattr(part, "out_features"):
        return int(part.in_features), int(part.out_features)
    return int(part.nx), int(part.nf)


def _matrix(module: nn.Module) -> Tensor:
    """Weight as (outputs, inputs); transformers' Conv1D, which GPT-2 uses, stores it transposed."""
    weight: Any = module.weight
    return cast("Tensor", weight if hasattr(module, "out_features") else weight.T)


def _is_linear(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    has_sizes = all(hasattr(module, name) for name in ("in_features", "out_features"))
    return isinstance(weight, Tensor) and (has_sizes or all(hasattr(module, name) for name in ("nx", "nf")))


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
        count = sum(1 for layer in module if any(True for _ in _pairs(layer)) or has_experts(layer))
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


def find_ffns(model: nn.Module) -> list[FFN | MixtureFFN]:
    """The feed-forward layer of every decoder layer that has one, in order.

    Raises:
        ModelError: no layer has a recognisable FFN, or a mixture of experts is built in a way that is not understood.
    """
    stack_name, stack = layer_stack(model)
    width = _width(model)
    found: list[FFN | MixtureFFN] = []
    for index, layer in enumerate(stack):
        prefix = f"{stack_name}.{index}"
        dense = {
            name: FFN(index, _join(prefix, name), host, keys, value, host is not layer and _is_whole(host, keys, value))
            for name, host, keys, value in _pairs(layer)
        }
        stacked = {
            name: Experts(_join(prefix, name), module, weight, transposed, by_expert)
            for name, module, weight, transposed, by_expert in find_experts(layer, width)
        }
        if len(dense) == 1 and not stacked:
            found.extend(dense.values())
        elif dense or stacked:
            place = _holder(layer, [*dense, *(name.rpartition(".")[0] for name in stacked)])
            parts: tuple[FFN | Experts, ...] = (*stacked.values(), *dense.values())
            found.append(MixtureFFN(index, _join(prefix, place), layer.get_submodule(place), parts))
    if not found:
        inside = sorted({type(module).__name__ for module in stack[0].modules()}) if len(stack) else []
        raise ModelError(
            f"no feed-forward layer found in {type(model).__name__}",
            hint=f"Looked for {_LOOKED_FOR}; {stack_name}.0 holds: {', '.join(inside)}.",
        )
    return found


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
    """Number of parameters, tied ones once."""
    return sum(p.numel() for p in model.parameters())
