"""A base with empty neurons, called slots, which LoRA files fill: one checkpoint for many adapters and attributes.

    gated        gate rows 0, gate bias c (act(c) is a power of two), up rows 0, down columns 0;
                 the up bias 1 makes one slot a constant, through which an attribute's LoRA adds its vector
    not gated    rows and columns 0, in pairs, act(z) - act(-z) = z; the constant is one neuron with bias c

A slot adds nothing by itself, so the logits are those of the base. `export.lora` fills the slots.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from braces_cli.core.errors import ModelError
from braces_cli.core.files import path_exists
from braces_cli.core.models.ffn import FFN, find_ffns
from braces_cli.core.models.identity import UNKNOWN, Fingerprint
from braces_cli.core.progress import Report, silent
from braces_cli.core.schema import Count, Kind, Name, Size, read
from braces_cli.export.checkpoint import Neurons, write_checkpoint
from braces_cli.export.plan import Form, Plan, expected_form, observed_form, plain_ffns, plan
from braces_cli.export.run import FORMAT_VERSION, Export, Opened, base_shape, copy_companions, probe_tokens
from braces_cli.export.verify import Reference


@dataclass(frozen=True)
class LayerModules:
    """The two modules of a decoder layer that LoRA files change.

    Attributes:
        reads: module whose rows are the input weights of the neurons: up, or the only projection without a gate.
        writes: module whose columns are the output weights of the neurons.
        offset: row of `reads` that belongs to neuron 0; not 0 if gate and up are one module.
        rows: number of rows of `reads`.
    """

    reads: str
    writes: str
    offset: Count
    rows: Count


@dataclass(frozen=True)
class Slots:
    """The slots of a base: the content of `braces_slots.json`.

    Attributes:
        model, revision, fingerprint: the base without slots.
        architecture: class of the written model.
        dtype: of the written model.
        width: neurons of the base's FFN; the slots are the neurons from `width` to `wider`.
        wider: neurons of the written FFN.
        gated: a slot is one neuron; otherwise a pair, of which the second reads the negative of the first.
        activation: (c, act(c)) of the gate of every slot, or without gates of the constant.
        constant: neuron with the constant value act(c); None if the architecture has no bias for it.
        first: first neuron for side paths.
        suffixes: endings of the names of all `reads` and all `writes` modules and of no others, or None.
        layers: modules of each decoder layer with an FFN.
    """

    model: Name
    revision: Name | None
    fingerprint: Fingerprint
    architecture: str
    dtype: str
    width: Count
    wider: Size
    gated: bool
    activation: tuple[float, float]
    constant: Count | None
    first: Count
    suffixes: list[str] | None
    layers: dict[Count, LayerModules]
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
    """Return the record of a base with slots.

    Raises:
        ModelError: missing, damaged, or of another version.
    """
    path = folder / f"braces_{SlotsExport.name}.json"
    if not path_exists(path):
        hint = "Give a folder that braces export slots wrote."
        raise ModelError("no base with slots here", where=str(folder), hint=hint)
    return read(_RECORD, path)


@dataclass(frozen=True)
class SlotsExport(Export):
    """A base with slots.

    Attributes:
        count: minimum number of slots per layer.
        pad_to_multiple_of: the width of the FFN is rounded up to a multiple of this.
    """

    name = "slots"

    count: int = 64
    pad_to_multiple_of: int = 64

    def write(self, opened: Opened, folder: Path, report: Report) -> tuple[dict[str, Any], dict[str, Any]]:
        session, base = opened.session, opened.session.base
        try:
            ffns = plain_ffns(base.model, session.ffns)
            form = observed_form(base.model, ffns, probe_tokens(session))
            slots_plan, slots = plan_slots(base.model, ffns, form, self.count, self.pad_to_multiple_of)
        except ModelError as error:
            raise _takes_no_slots(error) from error
        write_empty(folder, base.model, slots_plan, slots, ffns, report)
        copy_companions(session, folder)
        source = {"model": base.name, "revision": base.revision, "fingerprint": base.fingerprint}
        return slots.facts(), asdict(slots) | source

    def verify(self, folder: Path, expected: Reference) -> dict[str, Any]:
        measured = super().verify(folder, expected)
        return {name: value for name, value in measured.items() if "effect" not in name}

    def describe(self) -> dict[str, Any]:
        model = base_shape(self.request)
        try:
            ffns = plain_ffns(model, find_ffns(model))
            slots_plan, slots = plan_slots(model, ffns, expected_form(ffns[0]), self.count, self.pad_to_multiple_of)
        except ModelError as error:
            raise _takes_no_slots(error) from error
        total = sum(shape.numel() for shape in slots_plan.shapes.values())
        return slots.facts() | {"trainable_parameters": 0, "total_parameters": total}


def _takes_no_slots(error: ModelError) -> ModelError:
    """The refusal of a merge as a refusal of slots."""
    return ModelError(error.message.replace("be merged", "take slots"), hint=error.hint)


def plan_slots(model: Any, ffns: list[FFN], form: Form, count: int, pad_to_multiple_of: int = 64) -> tuple[Plan, Slots]:
    """Plan the checkpoint with slots; the base's name and fingerprint are left open.

    Args:
        form: of all FFNs.
        count: minimum number of slots per layer.
        pad_to_multiple_of: the width is rounded up to a multiple of this.

    Raises:
        ModelError: slots are not possible.
    """
    rank = count if form.gated else -(-count // 2)
    activation = form.constant_gate
    try:
        slots_plan = plan(model, ffns, form, rank, pad_to_multiple_of, steering=False, constant=activation is not None)
        constant = None if activation is None else slots_plan.width
    except ModelError:
        # Without biases there are slots for side paths, and none for attributes.
        slots_plan, constant = plan(model, ffns, form, rank, pad_to_multiple_of, steering=False), None
    layers: dict[int, dict[str, Any]] = {ffn.layer: {} for ffn in ffns}
    for name, role in slots_plan.roles.items():
        module, modules = name.removesuffix(".weight"), layers[role.layer]
        if role.part in ("up", "key", "gate_up"):
            fused = role.part == "gate_up"
            offset = slots_plan.wider if fused and form.gate_first else 0
            modules.update(reads=module, offset=offset, rows=slots_plan.wider * (2 if fused else 1))
        elif role.part == "value":
            modules["writes"] = module
    groups = [[modules[end] for modules in layers.values()] for end in ("reads", "writes")]
    slots = Slots(
        model="",
        revision=None,
        fingerprint=UNKNOWN,
        architecture=slots_plan.architecture,
        dtype=str(model.dtype).removeprefix("torch."),
        width=slots_plan.width,
        wider=slots_plan.wider,
        gated=form.gated,
        activation=activation or (0.0, 1.0),
        constant=constant,
        first=slots_plan.width + (constant is not None),
        suffixes=_suffixes(slots_plan, groups),
        layers={layer: LayerModules(**modules) for layer, modules in layers.items()},
        format_version=FORMAT_VERSION,
    )
    return slots_plan, slots


def _suffixes(slots_plan: Plan, groups: list[list[str]]) -> list[str] | None:
    """For each group of modules the shortest ending of their names that no other module with a weight has."""
    modules = [name.removesuffix(".weight") for name in slots_plan.shapes if name.endswith(".weight")]
    suffixes = []
    for group in groups:
        parts = group[0].split(".")
        endings = [".".join(parts[-length:]) for length in range(1, len(parts))]
        unique = [end for end in endings if {name for name in modules if name.endswith(f".{end}")} == set(group)]
        if not unique:
            return None
        suffixes.append(unique[0])
    return suffixes


def write_empty(
    folder: Path, model: torch.nn.Module, slots_plan: Plan, slots: Slots, ffns: list[FFN], report: Report = silent
) -> None:
    """Write weights and config of the base with empty slots into `folder`."""
    count, d = slots.wider - slots.width, ffns[0].hidden_size
    bias = torch.zeros(count)
    if slots.constant is not None:
        bias[slots.constant - slots.width] = 1.0 if slots.gated else slots.activation[0]
    gate = torch.full((count,), slots.activation[0] if slots.gated else 0.0)
    empty = Neurons(gate, torch.zeros(count, d), torch.zeros(d, count), None, bias)
    write_checkpoint(folder, model, slots_plan, {ffn.layer: empty for ffn in ffns}, report)
