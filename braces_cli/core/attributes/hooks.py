"""Steering: what attributes add to the FFN output of each layer, and the hooks that add it.

Two kinds of attributes add up:

- With a direction, or without an adapter: a steering vector, s * scale * direction in the layers of the attribute. In a
  mixture of experts it is added after the whole mixture, so that it does not depend on the router.
- Without a direction, as trained attributes are: through the adapter. `s r_c` joins the relevance scores, which adds
  s B (A h_c) in every adapted layer.

Erasing removes the component y U U^T of the FFN output y, with U (d, k) orthonormal: the directions p of the attributes
at the FFN's output. It comes last, after adapter and steering vectors.

s = 0 is bit-identical to no attribute. With a strength per row of the batch, the vectors are (batch, 1, d).
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from braces_cli.core.adapter.layer import RelevanceModule
from braces_cli.core.adapter.model import Session
from braces_cli.core.attributes.pooling import output_watches
from braces_cli.core.attributes.vector import Attribute
from braces_cli.core.attributes.words import neutral_texts
from braces_cli.core.config import format_ranges
from braces_cli.core.errors import ConfigError
from braces_cli.core.models.ffn import FFN, MixtureFFN
from braces_cli.core.models.generate import next_generated, prompt_lengths
from braces_cli.core.models.load import input_device
from braces_cli.core.models.structure import add_to_output, hooks_changed, layer_output, with_layer_output
from braces_cli.core.models.tokenize import encode

# s of an attribute: one number, or (batch, 1, 1), one per row.
Strength = float | Tensor
Terms = Sequence[tuple[Attribute, Strength]]


@dataclass(frozen=True)
class LayerSteering:
    """Steering of one decoder layer: the addition to its FFN output.

    Attributes:
        ffn: of the layer.
        residual: norm that moves the residual stream by its median norm.
        vector: sum of the steering vectors, (d,) or (batch, 1, d) in float32 on the CPU; None without one.
        shift: what is added to R times the query, (d_r,) or (batch, 1, d_r); None without attributes through it.
        shifted: what `shift` adds to the FFN output, (rows, d) in float32 on the CPU; for experts their mean.
    """

    ffn: FFN | MixtureFFN
    residual: float
    vector: Tensor | None = None
    shift: Tensor | None = None
    shifted: Tensor | None = None

    @property
    def layer(self) -> int:
        """Number of the decoder layer."""
        return self.ffn.layer

    @property
    def total(self) -> Tensor:
        """Sum of both parts, (rows, d)."""
        vector = torch.zeros(1, self.ffn.hidden_size) if self.vector is None else self.vector
        vector = vector.reshape(-1, self.ffn.hidden_size)
        return vector if self.shifted is None else vector + self.shifted

    @property
    def share(self) -> float:
        """Norm of the sum relative to the median norm of the residual stream; the largest of the rows."""
        return float(self.total.norm(dim=1).max()) / self.residual


def layer_steering(session: Session, terms: Terms, layers: Collection[int] | None = None) -> list[LayerSteering]:
    """Return what steering adds, for each layer to which it adds something.

    Args:
        terms: attributes with their strengths s.
        layers: decoder layers to steer; None: the layers of each steering vector, and all of the adapter's layers for
            an attribute that goes through the adapter.

    Raises:
        ConfigError: a strength that is not finite, or that makes a vector that is not finite; a layer that the adapter
            does not have, for an attribute that goes through the adapter.
    """
    for attribute, s in terms:
        if not (s.isfinite().all() if isinstance(s, Tensor) else math.isfinite(s)):
            raise ConfigError(f"the strength of `{attribute.name}` is {s}", where="--s", hint="Give a finite number.")
    active = [(attribute, s) for attribute, s in terms if (s.any() if isinstance(s, Tensor) else s != 0)]
    through = [(each, s) for each, s in active if session.adapter is not None and each.direction is None]
    direct = [(each, s) for each, s in active if session.adapter is None or each.direction is not None]
    modules = {} if session.adapter is None else {ffn.layer: module for ffn, module in session.adapter.adapted_ffns}
    if through and layers is not None and (missing := sorted(set(layers) - set(modules))):
        hint = f"It has layers {format_ranges(modules)}."
        raise ConfigError(f"the adapter has no layer {missing[0]} to steer", where="--layers", hint=hint)
    found = []
    for row, ffn in enumerate(session.ffns):
        here = [(each, s) for each, s in direct if ffn.layer in (each.effective_layers if layers is None else layers)]
        vector = shift = shifted = None
        if here:
            vector = torch.zeros(ffn.hidden_size)
            for each, s in here:
                vector = vector + s * float(each.scale[row]) * each.steering_direction[row]
        if through and ffn.layer in modules and (layers is None or ffn.layer in layers):
            shift, shifted = _shift(session, ffn, modules[ffn.layer], row, through)
        if vector is None and shift is None:
            continue
        layer = LayerSteering(ffn, float(active[0][0].residual[row]), vector, shift, shifted)
        if not math.isfinite(layer.share):
            what = f"the vector that is added in layer {ffn.layer} is not finite"
            raise ConfigError(what, where="--s", hint="Give a smaller strength.")
        found.append(layer)
    return found


def _shift(
    session: Session, ffn: FFN | MixtureFFN, module: RelevanceModule, row: int, terms: Terms
) -> tuple[Tensor, Tensor]:
    """Return R h_c of one layer summed over terms, (d_r,) or (batch, 1, d_r), and what it adds to the output."""
    assert session.adapter is not None
    with torch.no_grad():
        pooled = [(each.state_at(module.relevance_to)[row], s) for each, s in terms]
        states = [(session.adapter.states(p).to(module.weight), s) for p, s in pooled]
        parts = [(s.to(h) if isinstance(s, Tensor) else s) * h for h, s in states]
        state = torch.stack(torch.broadcast_tensors(*parts)).sum(dim=0)
        projection = module.projection()
        shift = projection @ state if state.ndim == 1 else state @ projection.mT
        columns = shift.reshape(-1, module.rank).mT  # (d_r, rows)
        each = [module.factors(part.values(), torch.float32)[1] @ columns for part in ffn.parts]
        # The router chooses the experts of each token; their mean is only for the size.
        vectors = torch.cat([vector.reshape(-1, *vector.shape[-2:]) for vector in each]).mean(dim=0)  # (d, rows)
    return shift, vectors.mT.float().cpu()


class Selection:
    """Tokens that are steered in the current forward pass of a model, by scope.

    `generated` starts with the first generated token as input, so the distribution of that token is the base's.
    """

    def __init__(self, scope: str) -> None:
        self._scope = scope
        self._chosen: Tensor | None = None

    def watch(self, model: Any) -> Callable[[], None]:
        """Follow the passes of `model` until the returned function is called."""
        return model.register_forward_pre_hook(self._choose, prepend=True, with_kwargs=True).remove

    def _choose(self, module: Any, args: tuple, kwargs: dict) -> None:
        ids = args[0] if args else kwargs["input_ids"]
        generated = next_generated(ids.shape[1]).unsqueeze(2)
        self._chosen = generated if self._scope == "generated" else ~generated

    def part(self, changed: Tensor) -> Tensor:
        """Return a change of all tokens, (rows, tokens, d) or (rows * tokens, d), that is 0 outside the scope."""
        if self._scope == "all":
            return changed
        assert self._chosen is not None
        # The rows of a mask are those of the batch, or one for all rows.
        rows = changed.reshape(-1, self._chosen.shape[1], changed.shape[-1])
        return (rows * self._chosen.to(changed.device)).reshape(changed.shape)

    def of(self, added: Tensor) -> Tensor | None:
        """Return what is added to the tokens of this pass: `added`, (rows, tokens, d), or None for no token."""
        if self._scope == "all":
            return added
        assert self._chosen is not None
        # A pass of generation has tokens of one kind; its rows can be more than those of the mask.
        if not self._chosen.any():
            return None
        return added if self._chosen.all() else added * self._chosen.to(added.device)


def erased_directions(
    session: Session, attributes: Sequence[Attribute], layers: Collection[int] | None = None
) -> dict[int, Tensor]:
    """Return U (d, k) of each layer where attributes are erased: in `layers`, or those of their steering vectors."""
    found = {}
    for row, ffn in enumerate(session.ffns):
        # Without the mean output of the reference: it has the attention sink, whose removal would break the model.
        states = [
            p - (p @ mean) / (mean @ mean).clamp(min=1e-30) * mean
            for each in attributes
            for p, mean in [(each.state_at("output")[row], each.reference[1][row])]
            if ffn.layer in (each.effective_layers if layers is None else layers)
        ]
        if not states:
            continue
        left, sizes, _ = torch.linalg.svd(F.normalize(torch.stack(states, dim=1), dim=0), full_matrices=False)
        # Opposite ends of one axis are one direction.
        found[ffn.layer] = left[:, sizes > 1e-4]
    return found


def remaining(session: Session, directions: Mapping[int, Tensor], scope: str = "all") -> dict[int, float]:
    """Return the share of the directions that remains in the residual stream after each layer where they are erased.

    The rms over the tokens of the neutral texts of the component in the stream, over that without erasing.
    """
    ffns = [ffn for ffn in session.ffns if ffn.layer in directions]
    base, sums = session.base, torch.zeros(2, len(ffns), dtype=torch.float64)

    def add(kind: int, index: int, h: Tensor) -> None:
        basis = directions[ffns[index].layer].to(h.device)
        sums[kind, index] += (h.detach().float() @ basis).double().square().sum().cpu()

    for kind, erased in enumerate(({}, directions)):
        with steered(session, (), scope=scope, erase=erased), ExitStack() as stack, torch.no_grad():
            for index, watch in enumerate(output_watches(base.model, ffns)):
                stack.callback(watch(partial(add, kind, index)).remove)
            for text in neutral_texts():
                ids = torch.tensor([encode(base.tokenizer, text).ids], device=input_device(base.model))
                with prompt_lengths(torch.ones(1, 1)):
                    base.model(input_ids=ids, use_cache=False)
    shares = (sums[1] / sums[0].clamp(min=1e-30)).sqrt().tolist()
    return {ffn.layer: share for ffn, share in zip(ffns, shares, strict=True)}


@contextmanager
def steered(
    session: Session,
    terms: Terms,
    layers: Collection[int] | None = None,
    scope: str = "all",
    erase: Mapping[int, Tensor] | None = None,
    amount: float = 1.0,
) -> Iterator[list[LayerSteering]]:
    """Steer the model inside the `with` block; yields the steered layers.

    Args:
        terms: attributes with their strengths s; if one is a tensor, every batch must have as many rows.
        layers: see `layer_steering`.
        scope: tokens that are steered, one of SCOPES; see `Selection`.
        erase: decoder layer -> orthonormal directions (d, k) that its FFN output loses.
        amount: share of the component along these directions that is removed.

    Raises:
        ConfigError: see `layer_steering`.
    """
    found, selection = layer_steering(session, terms, layers), Selection(scope)
    modules = {} if session.adapter is None else {ffn.layer: module for ffn, module in session.adapter.adapted_ffns}

    def shift_selected(*_: Any) -> None:
        for each in found:
            if each.shift is not None:
                modules[each.layer].shift = selection.of(each.shift)

    with ExitStack() as stack:
        if scope != "all":
            # Prepended: the last one registered runs first.
            stack.callback(session.base.model.register_forward_pre_hook(shift_selected, prepend=True).remove)
            stack.callback(selection.watch(session.base.model))
        for each in found:
            if each.vector is not None:
                module = each.ffn.output_module
                weight = next((p for p in module.parameters() if p.is_floating_point() and not p.is_meta), each.vector)
                # A compiled pass must not move the vector.
                stack.callback(add_to_output(module, each.vector.to(weight.device, weight.dtype), selection.of).remove)
            if each.shift is not None:
                modules[each.layer].shift = each.shift
                stack.callback(setattr, modules[each.layer], "shift", None)
        for ffn in session.ffns:
            if erase and amount and ffn.layer in erase:
                host = ffn.host if isinstance(ffn, FFN) and ffn.is_host_output else ffn.output_module
                hook = partial(_erase, erase[ffn.layer], amount, selection)
                stack.callback(host.register_forward_hook(hook).remove)
        if erase or any(each.vector is not None for each in found):
            hooks_changed(session.base.model)
        yield found


def _erase(directions: Tensor, amount: float, selection: Selection, module: Any, args: tuple, output: Any) -> Any:
    hidden = layer_output(output)
    basis = directions.to(hidden.device)
    change = selection.part((hidden.float() @ basis) @ basis.mT)
    return with_layer_output(output, (hidden.float() - amount * change).to(hidden.dtype))


def terms_of_rows(
    find: Callable[[str], Attribute], rows: Sequence[Mapping[str, float]]
) -> list[tuple[Attribute, Strength]]:
    """Return the terms of a batch with attributes per row; strengths are numbers if all rows have the same.

    Args:
        find: returns the attribute of a name.
        rows: name -> strength of each row.
    """
    if all(row == rows[0] for row in rows):
        return [(find(name), s) for name, s in rows[0].items()]
    names = dict.fromkeys(name for row in rows for name in row)
    return [(find(name), torch.tensor([[[float(row.get(name, 0.0))]] for row in rows])) for name in names]
