"""Mixtures of experts: the feed-forward layer of a decoder layer as several parts that share one R and one gate.

    sum_e p_e FFN_e(h)   ->   sum_e p_e (FFN_e(h) + B_e (A h) + s B_e (A h_c)),    B_e = g / sqrt(d_r) W_e W_e^T R^T

Experts that are modules of their own, routed or shared, are ordinary feed-forward networks (`ffn.FFN`): the term joins
what leaves their value projection, so the model weighs it as it weighs the expert. Experts that are slices of one 3-D
weight have no such place; `Experts` describes the module that holds them, and the term is weighed here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from braces_cli.core.models.module_structure import outside_mixers
from braces_cli.core.utils.errors import ModelError


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
