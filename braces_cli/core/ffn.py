"""Find the feed-forward layers of a causal language model by their structure.

A feed-forward network (FFN) is a pair of projections around an activation:

    h --key--> d_ff neurons --activation--> w --value--> sum_j w_j v_j

`key` is one projection (GPT-2), two (gate and up, Llama) or one fused of width 2 d_ff (Phi-3); `value` maps
d_ff back to d, and its columns are the value vectors. Nothing here knows a model by name: what is looked for is
a module that owns an activation and such a pair among its direct children, inside a stack of layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from braces_cli.core.errors import ConfigError, ModelError
from braces_cli.core.structure import is_whole, keeps_state, outside_mixers, pairs, runs_in_function, sizes

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
        return sizes(self.value)[1]

    @property
    def value_vectors(self) -> int:
        """d_ff, the number of value vectors."""
        return sizes(self.value)[0]

    def value_matrix(self) -> Tensor:
        """W_V as a (d, d_ff) view of the model's own weight: column j is the value vector v_j."""
        return _matrix(self.value)

    def value_path(self, model: nn.Module) -> str:
        """Full name of the value projection inside `model`."""
        return next(name for name, module in model.named_modules() if module is self.value)


def _matrix(module: nn.Module) -> Tensor:
    """Weight as (outputs, inputs); transformers' Conv1D, which GPT-2 uses, stores it transposed."""
    weight: Any = module.weight
    return cast("Tensor", weight if hasattr(module, "out_features") else weight.T)


def layer_stack(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and ModuleList of the decoder layers: of the outermost lists, the one whose layers hold the most FFNs.

    Vision and audio towers are left out. Where several lists are owned by modules of one class, as
    HRM's slow and fast stack, they are one decoder: the list is a new one of all their layers, the name the last one's.

    Raises:
        ModelError: the model has no list of layers.
    """
    stacks = _stacks(model)
    return stacks[-1][0], nn.ModuleList([layer for _, stack in stacks for layer in stack])


def hides_gradients(model: nn.Module) -> bool:
    """The module that runs the layers does so where autograd does not see it, see `runs_in_function`."""
    return any(runs_in_function(model.get_submodule(name.rpartition(".")[0])) for name, _ in _stacks(model))


def _stacks(model: nn.Module) -> list[tuple[str, nn.ModuleList]]:
    """(name, list of layers) of the decoder, mostly one. Raises ModelError as `layer_stack` does."""
    embed: Any = getattr(model, "get_input_embeddings", None)
    embedding = embed() if embed else None
    found: list[tuple[int, str, nn.ModuleList, type]] = []
    closed: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(f"{outer}.") for outer in closed):
            continue
        if name and _is_tower(module, embedding):
            closed.append(name)
        elif isinstance(module, nn.ModuleList):
            closed.append(name)
            owner = model.get_submodule(name.rpartition(".")[0])
            count = sum(bool(pairs(layer) or experts(layer)) for layer in module)
            found.append((count, name, module, type(owner)))
    if not found:
        raise ModelError(
            f"{type(model).__name__} has no list of layers",
            hint=f"braces looked for {_LOOKED_FOR}; a model without feed-forward layers has nothing to attach to.",
        )
    # Of equal ones the last: in an encoder-decoder model the decoder, which comes second, is the one that generates.
    most = max(count for count, *_ in found)
    owner_class = [owner for count, _, _, owner in found if count == most][-1]
    return [(name, stack) for count, name, stack, owner in found if owner is owner_class and (count or not most)]


def _is_tower(module: nn.Module, embedding: Any) -> bool:
    """A model inside the model that sees or hears: it neither embeds tokens nor keeps a cache of them."""
    return hasattr(module, "main_input_name") and embedding not in module.modules() and not keeps_state(module)


def experts(layer: nn.Module) -> str | None:
    """What shows that this layer mixes experts, or None. Attaching to one part of a mixture would be silently wrong."""
    for name, module in outside_mixers(layer):
        for kind, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 3 and min(parameter.shape) > 1:
                return f"{name}.{kind} {tuple(parameter.shape)}"
    for name, module in outside_mixers(layer):
        # DBRX stacks its experts in two dimensions; only their number tells.
        for key, value in vars(module).items():
            if "experts" in key and isinstance(value, int) and value > 1:
                return f"{name}.{key} = {value}"
    names = [pair.name for pair in pairs(layer)]
    return ", ".join(names[:3]) if len(names) > 1 else None


def find_ffns(model: nn.Module) -> list[FFN]:
    """Every feed-forward layer of the decoder, in order.

    Raises:
        ModelError: no layer has a recognisable FFN, or a layer mixes several experts.
    """
    stacks = _stacks(model)
    layers = [layer for _, stack in stacks for layer in stack]
    for index, layer in enumerate(layers):
        mixture = experts(layer)
        if mixture:
            raise ModelError(
                f"layer {index} of {type(model).__name__} is a mixture of experts ({mixture})",
                hint="braces attaches to models with one feed-forward network a layer.",
            )
    found = dense_ffns(model)
    if not found:
        inside = sorted({type(module).__name__ for module in layers[0].modules()}) if layers else []
        raise ModelError(
            f"{type(model).__name__} has no feed-forward layer, and braces attaches to nothing else",
            hint=f"Looked for {_LOOKED_FOR}; {stacks[-1][0]}.0 holds: {', '.join(inside)}.",
        )
    return found


def dense_ffns(model: nn.Module) -> list[FFN]:
    """The FFNs of the layers that hold exactly one, in order; layers that mix experts are passed over.

    Raises:
        ModelError: the model has no list of layers.
    """
    layers = [(f"{name}.{place}", layer) for name, stack in _stacks(model) for place, layer in enumerate(stack)]
    found: dict[nn.Module, FFN] = {}
    for index, (layer_name, layer) in enumerate(layers):
        if experts(layer):
            continue
        for pair in pairs(layer):
            path = f"{layer_name}.{pair.name}" if pair.name else layer_name
            whole = pair.host is not layer and is_whole(pair)
            # Layers may share one module: it is one FFN, counted where it comes first.
            found.setdefault(pair.value, FFN(index, path, pair.host, pair.keys, pair.value, whole))
    return list(found.values())


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
