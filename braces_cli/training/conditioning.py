"""Training with attributes: names in rows -> pooled states, and the condition of each batch.

The condition is computed before the forward pass. Under FSDP2 it reads gathered copies of parameters that are sharded
outside their layer's pass; the gradients of the copies are averaged over the processes and added to the shards.
"""

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

# Must be equal. States are not compared: one word less can change a state by less than rounding does.
_IDENTITY_FIELDS = ("words", "pooling", "examples", "provenance")


def gather_attributes(
    session: Session, settings: TrainSettings, sets: Sequence[Examples | Stream], start: StoredAdapter | None
) -> list[Attribute]:
    """Attributes of the rows, of `--opposites` and of the adapter `start`, with their pooled states.

    Raises:
        DataError: a row names an unknown attribute.
        ConfigError: `--opposites` names an unknown attribute, or no row names an attribute.
    """
    folder = settings.attributes
    stored: dict[str, Attribute] = {}
    if start is not None and start.config.attributes:
        stored = load_attributes(start.folder / TRAINED_FILE, session)
    known = sorted({*known_attributes(session, folder), *stored})
    conditions = [each for examples in sets for each in examples.conditions]
    rows = [each for each in conditions if each is not None and each.attribute is not None]
    for row in rows:
        if row.attribute not in known:
            hint = f"{near_misses(str(row.attribute), known)} Known: {', '.join(known)}.".strip()
            raise DataError(f"unknown attribute `{row.attribute}`", where=row.where, hint=hint)
    named = {str(row.attribute) for row in rows} | {name for pair in settings.pairs for name in pair}
    if not named:
        hint = "Rows name their attribute there; neutral, empty and null train at strength 0."
        raise ConfigError("no row names an attribute", where="--attribute-field", hint=hint)
    found = {
        name: stored[name] if name in stored else find_attribute(session, name, folder, for_steering=False)
        for name in sorted({*named, *stored})
    }
    for one, other in settings.pairs:
        found[one], found[other] = opposite(found[one], found[other])
    return list(found.values())


def with_original_states(attributes: Sequence[Attribute], checkpoint: Path, session: Session) -> list[Attribute]:
    """`attributes` with the states in `checkpoint`: states built again differ by rounding on another device.

    Raises:
        ConfigError: an attribute has changed since the run started.
        ModelError: the checkpoint's file is damaged, or from another base.
    """
    original = load_attributes(checkpoint / TRAINED_FILE, session)
    for now in attributes:
        then = original.get(now.name)
        if then is None or any(getattr(now, each) != getattr(then, each) for each in _IDENTITY_FIELDS):
            hint = "Give the attributes of the original run, another --output-dir, or --overwrite."
            what = f"attribute `{now.name}` has changed since the run was started"
            raise ConfigError(what, where=str(checkpoint), hint=hint)
    return [original[attribute.name] for attribute in attributes]


class Conditioner:
    """Condition each batch on the attributes of its rows.

    Args:
        adapter: with its condition MLP.
        attributes: all attributes that rows may name.
    """

    def __init__(self, adapter: Adapter, attributes: Sequence[Attribute]) -> None:
        self._adapter = adapter
        self._index = {attribute.name: k for k, attribute in enumerate(attributes)}
        device = adapter.adapted_ffns[0][1].weight.device
        rows = [[attribute.layers.index(layer) for layer in adapter.layers] for attribute in attributes]
        states = [attribute.state_at(adapter.relevance_to) for attribute in attributes]
        self._pooled = torch.stack([state[row] for state, row in zip(states, rows, strict=True)]).to(device)
        # Gathered copies of sharded parameters, for one optimizer step.
        self._copies: dict[Any, Tensor] = {}

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
        self._adapter.condition(self._adapter.states(self._pooled, self._gathered), strengths, self._gathered)

    def _gathered(self, parameter: Any) -> Tensor:
        """`parameter` itself, or a gathered copy with gradients if it is sharded. Collective, in the same order."""
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
        """Add the gradients of the copies to the shards; call after the last backward pass of an optimizer step."""
        from torch.distributed.tensor import DTensor, Partial

        for parameter, copy in self._copies.items():
            # A process whose batches had no row contributes zeros, but must take part.
            gradient = torch.zeros_like(copy) if copy.grad is None else copy.grad
            mesh, placements = parameter.device_mesh, parameter.placements
            parts = DTensor.from_local(gradient, mesh, [Partial("avg")] * mesh.ndim, run_check=False)
            shard = parts.redistribute(mesh, placements)
            parameter.grad = shard if parameter.grad is None else parameter.grad + shard
        self._copies = {}

    def clear(self) -> None:
        """Remove the condition."""
        self._adapter.condition(None)
