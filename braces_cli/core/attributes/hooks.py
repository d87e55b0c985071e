"""Steer: set the constant that attributes add at every layer, and say how strong a push it is.

An attribute without a direction of its own, such as one that the adapter was trained with, goes through the adapter:
`s r_c` joins the relevance, and the FFN output moves by s B (A h_c). One with a direction pushes, with an adapter or
without: in its layers the output moves by s * scale * direction, the sum of value vectors with weights r_c of least
norm. Without an adapter p stands in for a direction. In a mixture of experts a push joins what leaves the whole
mixture, so it does not depend on the router. Attributes add up; s = 0 is no attribute at all, so the result is the same
bit for bit. The rows of a batch may have a strength each: then the constant is (batch, 1, d), made once for the batch,
and the forward pass is that of a uniform one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from braces_cli.core.adapter.model import Adapter, Session
from braces_cli.core.attributes.vector import Attribute
from braces_cli.core.errors import ConfigError
from braces_cli.core.models.ffn import FFN, MixtureFFN
from braces_cli.core.models.structure import add_to_output, hooks_changed

# s of an attribute: one for all rows, or (batch,), one for each.
Strength = float | Tensor


@dataclass(frozen=True)
class SteeringSize:
    """Size of the steering vector of one layer: its norm over the median norm of the residual stream after the layer.

    Of rows with strengths of their own, the largest.
    """

    layer: int
    share: float


@contextmanager
def steered(
    session: Session, terms: Sequence[tuple[Attribute, Strength]], layers: Collection[int] | None = None
) -> Iterator[list[SteeringSize]]:
    """Steer the open model inside the `with` block; yields the size of the steering vector of each steered layer.

    Args:
        terms: attributes with their strengths s; where one is a tensor, every batch must have as many rows.
        layers: decoder layers that are steered; None means those that each attribute pushes, and all of the adapter's
            for an attribute that goes through it.

    Raises:
        ConfigError: a strength that is no finite number, or so large that what it adds is none.
    """
    for attribute, s in terms:
        if not (s.isfinite().all() if isinstance(s, Tensor) else math.isfinite(s)):
            raise ConfigError(f"the strength of `{attribute.name}` is {s}", where="--s", hint="Give a finite number.")
    active = [(attribute, s) for attribute, s in terms if (s.any() if isinstance(s, Tensor) else s != 0)]
    with ExitStack() as stack:
        through, direct = _split(session, active)
        moved = _add(stack, session.ffns, direct, layers)
        if session.adapter is not None and through:
            moved += _shift(stack, session.adapter, through, layers)
        if direct:
            hooks_changed(session.base.model)
        yield _in_range(_sizes(moved))


def _split(
    session: Session, terms: Sequence[tuple[Attribute, Any]]
) -> tuple[list[tuple[Attribute, Any]], list[tuple[Attribute, Any]]]:
    """The terms that go through the adapter, and those that push."""
    if session.adapter is None:
        return [], list(terms)
    through = [(each, s) for each, s in terms if each.direction is None]
    return through, [(each, s) for each, s in terms if each.direction is not None]


def _sizes(moved: Sequence[tuple[int, Tensor, float]]) -> list[SteeringSize]:
    """The push of each layer: `moved` holds layers, what is added there, (rows, d), and residual norms; a layer that an
    attribute pushes and another goes through the adapter of comes twice."""
    total: dict[int, Tensor] = {}
    for layer, vectors, _ in moved:
        total[layer] = total[layer] + vectors if layer in total else vectors
    residual = {layer: norm for layer, _, norm in moved}
    return [SteeringSize(layer, float(total[layer].norm(dim=1).max()) / residual[layer]) for layer in total]


def _in_range(sizes: list[SteeringSize]) -> list[SteeringSize]:
    for size in sizes:
        if not math.isfinite(size.share):
            what = f"the vector that is added in layer {size.layer} is not finite"
            raise ConfigError(what, where="--s", hint="Give a smaller strength.")
    return sizes


def terms_of_rows(
    find: Callable[[str], Attribute], rows: Sequence[Mapping[str, float]]
) -> list[tuple[Attribute, Strength]]:
    """Terms that steer each row of a batch by its own attributes; plain numbers where all rows have the same.

    Args:
        find: the attribute of a name.
        rows: name -> strength of each row.
    """
    if all(row == rows[0] for row in rows):
        return [(find(name), s) for name, s in rows[0].items()]
    names = dict.fromkeys(name for row in rows for name in row)
    return [(find(name), torch.tensor([float(row.get(name, 0.0)) for row in rows])) for name in names]


def _spread(s: Strength) -> Strength:
    """A strength as it is multiplied with a vector (d,): one of each row makes that (batch, 1, d)."""
    return s.view(-1, 1, 1) if isinstance(s, Tensor) else s


def _shift(
    stack: ExitStack, adapter: Adapter, terms: Sequence[tuple[Attribute, Strength]], layers: Collection[int] | None
) -> list[tuple[int, Tensor, float]]:
    found = []
    for ffn, adapter_layer in adapter.adapted_ffns:
        if layers is not None and ffn.layer not in layers:
            continue
        with torch.no_grad():
            row = terms[0][0].layers.index(ffn.layer)
            residual = float(terms[0][0].residual[row])
            states = [(adapter.states(each.state[row]).to(adapter_layer.weight), s) for each, s in terms]
            state = _sum([_spread(s.to(h) if isinstance(s, Tensor) else s) * h for h, s in states])
            projection = adapter_layer.projection()
            adapter_layer.shift = projection @ state if state.ndim == 1 else state @ projection.mT
            columns = adapter_layer.shift.reshape(-1, adapter_layer.rank).mT  # (d_r, rows)
            each = [adapter_layer.factors(part.values(), torch.float32)[1] @ columns for part in ffn.parts]
            # Of experts the mean, though which of them a token meets is the router's choice.
            vectors = torch.cat([vector.reshape(-1, *vector.shape[-2:]) for vector in each]).mean(dim=0)  # (d, rows)
        stack.callback(setattr, adapter_layer, "shift", None)
        found.append((ffn.layer, vectors.mT.float().cpu(), residual))
    return found


def _sum(parts: Sequence[Tensor]) -> Tensor:
    return torch.stack(torch.broadcast_tensors(*parts)).sum(dim=0)


def _add(
    stack: ExitStack,
    ffns: Sequence[FFN | MixtureFFN],
    terms: Sequence[tuple[Attribute, Strength]],
    layers: Collection[int] | None,
) -> list[tuple[int, Tensor, float]]:
    found = []
    for ffn, vector, residual in _vectors(ffns, terms, layers):
        place = ffn.host if isinstance(ffn, MixtureFFN) else ffn.value
        stack.callback(add_to_output(place, _near(place, vector)).remove)
        found.append((ffn.layer, vector.reshape(-1, ffn.hidden_size), residual))
    return found


def _near(place: nn.Module, vector: Tensor) -> Tensor:
    """The vector where a module's weights are and in their format, so that a compiled pass need not move it."""
    weight = next((p for p in place.parameters() if p.is_floating_point() and not p.is_meta), vector)
    return vector.to(weight.device, weight.dtype)


def _vectors(
    ffns: Sequence[FFN | MixtureFFN], terms: Sequence[tuple[Attribute, Strength]], layers: Collection[int] | None
) -> Iterator[tuple[FFN | MixtureFFN, Tensor, float]]:
    """Each layer pushed without training, the sum of s * scale * direction there, and its residual norm.

    The sum is (d,), or (batch, 1, d) where rows have strengths of their own.
    """
    for ffn in ffns:
        here = [(each, s) for each, s in terms if ffn.layer in (each.effective_layers if layers is None else layers)]
        if not here:
            continue
        row = here[0][0].layers.index(ffn.layer)
        total = torch.zeros(ffn.hidden_size)
        for each, s in here:
            total = total + _spread(s) * float(each.scale[row]) * each.steering_direction[row]
        yield ffn, total, float(here[0][0].residual[row])


def constants(
    session: Session, terms: Sequence[tuple[Attribute, float]], layers: Collection[int] | None = None
) -> dict[int, Tensor]:
    """What steering adds to the FFN output of each decoder layer, (d,) in float32 on the CPU.

    Experts of an adapter are left out: what it adds there depends on the router.
    """
    found = steering_vectors(session, terms, layers)
    with steered(session, terms, layers), torch.no_grad():
        for ffn, adapter_layer in session.adapter.adapted_ffns if session.adapter is not None else []:
            if adapter_layer.shift is not None and isinstance(ffn, FFN):
                vector = (adapter_layer.factors(ffn.values(), torch.float32)[1] @ adapter_layer.shift).cpu()
                found[ffn.layer] = found[ffn.layer] + vector if ffn.layer in found else vector
    return found


def steering_vectors(
    session: Session, terms: Sequence[tuple[Attribute, float]], layers: Collection[int] | None = None
) -> dict[int, Tensor]:
    """The part of `constants` that does not go through the adapter."""
    active = [(attribute, s) for attribute, s in terms if s != 0]
    return {ffn.layer: vector for ffn, vector, _ in _vectors(session.ffns, _split(session, active)[1], layers)}
