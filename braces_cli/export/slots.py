"""A base with empty neurons, called slots, which LoRA files fill: one checkpoint for many adapters and attributes.

    gated        gate rows 0, gate bias c (act(c) is a power of two), up rows 0, down columns 0;
                 the up bias 1 makes one slot a constant, through which an attribute's LoRA adds its vector
    not gated    rows and columns 0, in pairs, act(z) - act(-z) = z; the constant is one neuron with bias c

A slot adds nothing by itself, so the logits are those of the base. `export.lora` fills the slots.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from braces_cli.core.errors import ModelError
from braces_cli.core.models.ffn import FFN, MixtureFFN, find_ffns
from braces_cli.core.models.identity import Sizes
from braces_cli.core.progress import Report, silent
from braces_cli.core.schema import Count, Kind, Name, Size, read
from braces_cli.export.checkpoint import Neurons, write_checkpoint
from braces_cli.export.plan import Plan, ffn_form, plan
from braces_cli.export.run import FORMAT_VERSION, Opened, Request, base_shape, copy_companions, probe_tokens, run
from braces_cli.export.verify import Reference, verify_export


@dataclass(frozen=True)
class Slots:
    """The slots of a base: the content of `braces_slots.json`.

    Attributes:
        model, revision, base: the base without slots.
        architecture: class of the written model.
        dtype: of the written model.
        width: neurons of the base's FFN; the slots are the neurons from `width` to `wider`.
        wider: neurons of the written FFN.
        gated: a slot is one neuron; otherwise a pair, of which the second reads the negative of the first.
        activation: (c, act(c)) of the gate of every slot, or without gates of the constant.
        constant: neuron with the constant value act(c); None if the architecture has no bias for it.
        first: first neuron for side paths.
        offset: row of neuron 0 in the modules that LoRA files read with; not 0 if gate and up are one module.
        rows: number of rows of these modules.
        layers: names of the two modules of each decoder layer that LoRA files change: up, or the only projection
            without a gate, whose rows are the input weights of the neurons, and down, whose columns are their output
            weights.
    """

    model: Name
    revision: Name | None
    base: Sizes
    architecture: str
    dtype: str
    width: Count
    wider: Size
    gated: bool
    activation: tuple[float, float]
    constant: Count | None
    first: Count
    offset: Count
    rows: Count
    layers: dict[Count, tuple[Name, Name]]
    format_version: Literal[1] = field(kw_only=True)

    @property
    def rank(self) -> int:
        """Largest sum of the ranks of all adapters that are active at once."""
        return (self.wider - self.first) // (1 if self.gated else 2)

    def facts(self) -> dict[str, Any]:
        """Sizes as commands print and record them."""
        return {
            "architecture": self.architecture,
            "slots": self.wider - self.width,
            "width": self.wider,
            "rank": self.rank,
            "takes_attributes": self.constant is not None,
        }


_RECORD = Kind(Slots, ModelError, "Export the slots again, with this version of braces.")


def read_slots(folder: Path) -> Slots:
    """Return the record of a base with slots; raises ModelError if it is missing, damaged, or of another version."""
    return read(_RECORD, folder / "braces_slots.json")


def export_slots(
    request: Request, count: int = 64, pad_to_multiple_of: int = 64, report: Report = silent
) -> dict[str, Any]:
    """Write a base with at least `count` slots per layer, with FFNs of a width rounded up; see `export.run.run`."""

    def write(opened: Opened, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
        session, base = opened.session, opened.session.base
        copy_companions(session, folder)
        planned, slots = plan_slots(base.model, session.ffns, count, pad_to_multiple_of, probe_tokens(session))
        write_checkpoint(folder, base.model, planned, empty_slots(planned, slots), report)
        source = {"model": base.name, "revision": base.revision, "base": base.sizes}
        return slots.facts(), asdict(slots) | source

    def verify(folder: Path, expected: Reference) -> dict[str, Any]:
        measured = verify_export(folder, expected)
        return {name: value for name, value in measured.items() if "effect" not in name}

    return run("slots", request, write, verify, report)


def describe_slots(request: Request, count: int, pad_to_multiple_of: int) -> dict[str, Any]:
    """Facts of a base with slots that are known without the weights, for `--dry-run`."""
    shape = base_shape(request)
    planned, slots = plan_slots(shape, find_ffns(shape), count, pad_to_multiple_of)
    return slots.facts() | planned.size


def plan_slots(
    model: Any, found: Sequence[FFN | MixtureFFN], count: int, pad_to_multiple_of: int = 64, ids: Tensor | None = None
) -> tuple[Plan, Slots]:
    """Plan the checkpoint with slots; the base's name and sizes are left open.

    Args:
        ids: tokens for a forward pass, see `ffn_form`; None for a model without weights.

    Raises:
        ModelError: slots are not possible.
    """
    try:
        ffns, form = ffn_form(model, found, ids)
        activation = form.constant_gate
        has_constant = activation is not None
        try:
            biases = [] if activation is None else ["up" if form.gated else "key"]
            planned = plan(model, ffns, form, count, pad_to_multiple_of, biases)
        except ModelError:
            # Without biases there are slots for side paths, and none for attributes.
            has_constant = False
            planned = plan(model, ffns, form, count, pad_to_multiple_of)
    except ModelError as error:
        raise ModelError(error.message.replace("be merged", "take slots"), hint=error.hint) from error
    reads, writes = {}, {}
    for name, role in planned.roles.items():
        if role.parts == ("value",):
            writes[role.layer] = name.removesuffix(".weight")
        elif "up" in role.parts or role.parts == ("key",):
            reads[role.layer] = name.removesuffix(".weight")
            offset, rows = planned.wider * (role.parts == ("gate", "up")), planned.wider * len(role.parts)
    slots = Slots(
        model="",
        revision=None,
        base={"model_type": "", "layers": 0, "hidden_size": 0, "value_vectors": []},
        architecture=planned.architecture,
        dtype=str(model.dtype).removeprefix("torch."),
        width=planned.width,
        wider=planned.wider,
        gated=form.gated,
        activation=activation or (0.0, 1.0),
        constant=planned.width if has_constant else None,
        first=planned.width + has_constant,
        offset=offset,
        rows=rows,
        layers={layer: (reads[layer], writes[layer]) for layer in reads},
        format_version=FORMAT_VERSION,
    )
    return planned, slots


def empty_slots(planned: Plan, slots: Slots) -> Neurons:
    """Biases of the slots of each layer: constant gates, and one constant neuron."""
    count = slots.wider - slots.width
    parts = {"gate.bias": torch.full((count,), slots.activation[0])} if slots.gated else {}
    if slots.constant is not None:
        parts["up.bias" if slots.gated else "key.bias"] = bias = torch.zeros(count)
        bias[slots.constant - slots.width] = 1.0 if slots.gated else slots.activation[0]
    return dict.fromkeys(slots.layers, parts)
