"""Find the feed-forward layers of a causal language model by their structure.

A feed-forward network (FFN) is a pair of projections around an activation:

    h --key--> d_ff neurons --activation--> w --value--> sum_j w_j v_j

`key` is one projection (GPT-2), two (gate and up, Llama) or one fused of width 2 d_ff (Phi-3); `value` maps
d_ff back to d, and its columns are the value vectors. Nothing here knows a model by name: what is looked for is
a module that owns an activation and such a pair among its direct children, inside a stack of layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from braces_cli.core.models.module_structure import is_whole, keeps_state, pairs, sizes
from braces_cli.core.models.moe import Experts, MixtureFFN, find_experts, has_experts
from braces_cli.core.models.value_weights import Values, dense, stored_values
from braces_cli.core.utils.errors import ModelError

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
