"""Parameters that lie in pieces on several processes (FSDP2), whole while something outside the model reads them.

What an attribute adds is computed before the forward pass, from parameters that FSDP gathers only while their own layer
runs. So the pass reads whole copies, and their gradients go back into the pieces behind the backward pass: averaged
over the processes, as FSDP does with those of the layers.

Rows conditioned on attributes: their names -> pooled states, and each batch's strengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from braces_cli.core.adapter.files import StoredAdapter
from braces_cli.core.adapter.model import Adapter, Session
from braces_cli.core.attributes.files import TRAINED_FILE
from braces_cli.core.attributes.lookup import find_attribute, known_attributes
from braces_cli.core.attributes.vector import Attribute, load_attributes, opposite
from braces_cli.core.errors import ConfigError, DataError, near_misses
from braces_cli.data.dataset import Condition, Examples, Stream
from braces_cli.training.settings import TrainSettings


class GatheredParameters:
    """Whole copies of parameters for one optimizer step."""

    def __init__(self) -> None:
        self._copies: dict[Any, Tensor] = {}

    def full_tensor(self, parameter: Any) -> Tensor:
        """`parameter` itself where it is whole, else a copy with gradients, the same until `settle`.

        Every process must ask for the same parameters in the same order.
        """
        if not hasattr(parameter, "full_tensor"):
            result: Tensor = parameter
            return result
        if not torch.is_grad_enabled():
            return parameter.detach().full_tensor()
        if parameter not in self._copies:
            copy = parameter.detach().full_tensor().requires_grad_(parameter.requires_grad)
            self._copies[parameter] = copy
        return self._copies[parameter]

    def scatter_gradients(self) -> None:
        """Add the gradients of the copies to those of the parameters, and forget the copies."""
        from torch.distributed.tensor import DTensor, Partial

        for parameter, copy in self._copies.items():
            # A process whose batches had no row contributes nothing, but must take part.
            gradient = torch.zeros_like(copy) if copy.grad is None else copy.grad
            mesh, placements = parameter.device_mesh, parameter.placements
            parts = DTensor.from_local(gradient, mesh, [Partial("avg")] * mesh.ndim, run_check=False)
            shard = parts.redistribute(mesh, placements)
            parameter.grad = shard if parameter.grad is None else parameter.grad + shard
        self._copies = {}


# Share of a state's norm by which it may differ between devices and number formats: 0.2 to 1.3 % were seen.
_ROUNDING = 0.05
# What must be the same: a word less can change a state by less than rounding does.
_IDENTITY_FIELDS = ("words", "pooling", "examples", "provenance")


def gather_attributes(
    session: Session,
    settings: TrainSettings,
    sets: Sequence[Examples | Stream],
    folder: Path | None,
    start: StoredAdapter | None = None,
) -> list[Attribute]:
    """The attributes that the rows name, and those of `--opposites`, each with its pooled states.

    Args:
        folder: that attr-build wrote.
        start: adapter to continue from; its attributes are kept, with the states that it was trained with.

    Raises:
        DataError: a row names an attribute that is not known.
        ConfigError: `--opposites` names one, or there is none at all.
    """
    stored: dict[str, Attribute] = {}
    if start is not None and start.config.attributes:
        stored = load_attributes(start.folder / TRAINED_FILE, session)
    known = sorted({*known_attributes(session, folder), *stored})
    for row in (row for examples in sets for row in examples.conditions):
        if row.attribute is not None and row.attribute not in known:
            hint = f"{near_misses(row.attribute, known)} Known: {', '.join(known)}.".strip()
            raise DataError(f"unknown attribute `{row.attribute}`", where=row.where, hint=hint)
    named = {row.attribute for examples in sets for row in examples.conditions if row.attribute is not None}
    named |= {name for pair in settings.pairs for name in pair}
    if not named:
        hint = "Rows name their attribute there; neutral, empty and null train at strength 0."
        raise ConfigError("no row names an attribute", where="--attribute-field", hint=hint)
    names = sorted({*named, *stored})
    found = {
        name: stored[name] if name in stored else find_attribute(session, name, folder, for_steering=False)
        for name in names
    }
    for one, other in settings.pairs:
        found[one], found[other] = opposite(session, found[one], found[other])
    return list(found.values())


def with_original_states(attributes: Sequence[Attribute], checkpoint: Path | None, session: Session) -> list[Attribute]:
    """`attributes` with the states that the run was begun with, which `checkpoint` holds; as they are without one.

    Those built anew differ by rounding on another device, and the run goes on with what it was begun with.

    Raises:
        ConfigError: an attribute is another one now, because the file that it comes from has changed.
        ModelError: the checkpoint's file is damaged, or of another base.
    """
    if checkpoint is None or not attributes:
        return list(attributes)
    original = load_attributes(checkpoint / TRAINED_FILE, session)
    for now in attributes:
        then = original.get(now.name)
        same = then is not None and all(getattr(now, each) == getattr(then, each) for each in _IDENTITY_FIELDS)
        if then is None or not same or (now.state - then.state).norm() > _ROUNDING * then.state.norm():
            hint = "Give the attributes that the run was begun with, another --output-dir, or --overwrite."
            what = f"attribute `{now.name}` has changed since the run was begun"
            raise ConfigError(what, where=str(checkpoint), hint=hint)
    return [original[attribute.name] for attribute in attributes]


class Conditioner:
    """Sets what each batch is conditioned on.

    Args:
        adapter: with its condition MLP.
        attributes: all that rows may name.
    """

    def __init__(self, adapter: Adapter, attributes: Sequence[Attribute]) -> None:
        self._adapter = adapter
        self._index = {attribute.name: k for k, attribute in enumerate(attributes)}
        device = adapter.adapted_ffns[0][1].weight.device
        rows = [[attribute.layers.index(layer) for layer in adapter.layers] for attribute in attributes]
        self._pooled = torch.stack([a.state[row] for a, row in zip(attributes, rows, strict=True)]).to(device)
        self._gathered = GatheredParameters()

    def strengths(self, rows: Sequence[Condition | None]) -> Tensor:
        """s of each row and attribute, (rows, attributes)."""
        out = torch.zeros(len(rows), len(self._index))
        for row, condition in enumerate(rows):
            if condition is not None and condition.attribute is not None:
                out[row, self._index[condition.attribute]] = condition.strength
        return out

    def apply(self, strengths: Tensor) -> None:
        """Condition the next passes on `strengths`, with gradients to the MLP and projections.

        Args:
            strengths: (batch, attributes), or (batch, tokens, attributes) of packed rows.
        """
        full_tensor = self._gathered.full_tensor
        self._adapter.condition(self._adapter.states(self._pooled, full_tensor), strengths, full_tensor)

    def scatter_gradients(self) -> None:
        """Call behind the last backward pass of an optimizer step: under FSDP2 gradients go back into the pieces."""
        self._gathered.scatter_gradients()

    def clear(self) -> None:
        """Back to no attribute."""
        self._adapter.condition(None)
