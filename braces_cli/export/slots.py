"""A base with empty neurons, called slots, that LoRA files fill: one checkpoint for many adapters and attributes.

    gated     gate rows 0, gate bias c (act(c) is a power of two), up rows 0, down columns 0
              one slot reads 1 by its up bias: the constant slot, over which an attribute's LoRA writes its vector
    plain     rows and columns 0, in pairs, act(z) - act(-z) = z; the constant slot is one neuron with bias c

A slot writes nothing by itself, so the logits are those of the base. `lora_files` says how it is filled.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from braces_cli.core.adapter.model import base_name
from braces_cli.core.errors import ModelError
from braces_cli.core.files import path_exists, write_json, write_text
from braces_cli.core.models.ffn import FFN, find_ffns
from braces_cli.core.models.load import load_shape
from braces_cli.core.models.stored_fingerprint import UNKNOWN, Fingerprint
from braces_cli.core.progress import Report, silent
from braces_cli.core.schema import Count, Kind, Name, Size, check, cut, read
from braces_cli.core.versions import versions
from braces_cli.export.cards import slots_card
from braces_cli.export.checkpoint import Neurons, check_output, copy_companions, new_folder, write_checkpoint
from braces_cli.export.form import Form, Plan, constant_gate, expected_form, observed_form
from braces_cli.export.planner import plain_ffns, plan
from braces_cli.export.request import Request, inputs, open_bare, probe_tokens
from braces_cli.export.verify import Loading, Reference, figures, reference, verify_export

RECORD_FILE = "braces_slots.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class LayerModules:
    """The two modules of one decoder layer that LoRA files change.

    Attributes:
        reads: name of the module whose rows are what neurons read: up, or the only one where there is no gate.
        writes: name of the module whose columns are what neurons write.
        offset: row of `reads` that belongs to neuron 0; not 0 where gate and up are one module.
        rows: rows of `reads` in all.
    """

    reads: str
    writes: str
    offset: Count
    rows: Count


@dataclass(frozen=True)
class Slots:
    """What is where in a base with slots: the content of `braces_slots.json`.

    Attributes:
        model: the base that the slots were added to, as it is loaded again.
        revision: of the base, where it came from a hub.
        fingerprint: of the base.
        architecture: class of the written model.
        dtype: of the written model.
        width: neurons of the base's FFN; slots are those from here up to `wider`.
        wider: neurons of the written FFN.
        gated: a slot is one neuron; else a pair, of which the second reads the negative of the first.
        activation: (c, act(c)): the gate of every slot, or where there is no gate the constant slot.
        constant: neuron that is a constant act(c), None where the architecture has no bias for it.
        first: first neuron that a side path may use.
        suffixes: endings that no modules but those of all layers have, for LoRA configs; None where there are none.
        layers: the modules of each decoder layer with an FFN.
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

    @property
    def rank(self) -> int:
        """The sum of the ranks of all adapters that can be active at once."""
        return (self.wider - self.first) // (1 if self.gated else 2)


_ANY_RECORD = Kind(dict[str, Any], ModelError, "Export the slots again.", "base with slots")
_RECORD = Kind(Slots, ModelError, _ANY_RECORD.hint)


def write_slots(
    request: Request, count: int, output: Path, overwrite: bool = False, report: Report = silent
) -> dict[str, Any]:
    """Write the base with at least `count` slots a layer, proved, into `output`; returns what the command prints.

    Raises:
        ConfigError: the output folder is not empty, or is or lies in one of the inputs.
        ModelError: the base cannot be loaded or cannot take slots, or the proof fails; nothing is left behind.
        BracesError: the disk is full.
    """
    check_output(output, overwrite, inputs(request))
    with new_folder(output, overwrite) as folder:
        slots, expected = _write(request, count, folder, report)
        # The base is gone from memory: the proof loads what was written in a process of its own.
        gc.collect()
        report("proving", 0, 1)
        proof = verify_export(folder, expected, Loading("the base as it was"))
        report("proving", 1, 1)
        facts = {"model": slots.model, "dtype": slots.dtype, **_facts(slots)}
        found = {name: value for name, value in figures(proof).items() if "effect" not in name}
        write_json(folder / RECORD_FILE, {"format_version": FORMAT_VERSION, **asdict(slots), "versions": versions()})
        write_text(folder / "README.md", slots_card(facts | found))
    return {"output_dir": str(output), **facts, **found}


def describe_slots(request: Request, count: int) -> dict[str, Any]:
    """What would be written, from sizes alone; loads no weights.

    Raises:
        ModelError: the base cannot be reached, or takes no slots.
    """
    options = request.options
    name = base_name(request.model, None)
    model = load_shape(name, revision=options.revision, trust_remote_code=options.trust_remote_code)
    with _in_words_of_slots():
        ffns = plain_ffns(model, find_ffns(model))
        merge_plan, slots = plan_slots(model, ffns, expected_form(ffns[0]), count, request.pad_to_multiple_of)
    total = sum(shape.numel() for shape in merge_plan.shapes.values())
    return _facts(slots) | {"trainable_parameters": 0, "total_parameters": total}


@contextmanager
def _in_words_of_slots() -> Iterator[None]:
    """The planner refuses a merge; inside, what it refuses are slots."""
    try:
        yield
    except ModelError as error:
        raise ModelError(error.message.replace("be merged", "take slots"), hint=error.hint) from error


def _facts(slots: Slots) -> dict[str, Any]:
    return {
        "architecture": slots.architecture,
        "slots": slots.wider - slots.width,
        "width": slots.wider,
        "rank": slots.rank,
        "takes_attributes": slots.constant is not None,
    }


def _write(request: Request, count: int, folder: Path, report: Report) -> tuple[Slots, Reference]:
    """Everything that needs the base in memory; it is let go of on return."""
    report("loading", 0, 1)
    session = open_bare(request)
    model = session.base.model
    with _in_words_of_slots():
        ffns = plain_ffns(model, session.ffns)
        form = observed_form(model, ffns, probe_tokens(session))
        merge_plan, slots = plan_slots(model, ffns, form, count, request.pad_to_multiple_of)
    report("loading", 1, 1)
    expected = reference(session)
    write_empty(folder, model, merge_plan, slots, ffns, report)
    assert session.base.checkpoint is not None
    copy_companions(session.base.checkpoint, folder, session.base.tokenizer)
    base = {
        "model": session.base.name,
        "revision": session.base.revision,
        "fingerprint": session.base.fingerprint,
    }
    return Slots(**(vars(slots) | base)), expected


def plan_slots(model: Any, ffns: list[FFN], form: Form, count: int, pad_to_multiple_of: int = 64) -> tuple[Plan, Slots]:
    """How slots go into `model`, and which neuron is what; the base is left unnamed.

    Args:
        form: of all its FFNs.
        count: slots a layer, at least; the width is rounded up to a multiple of `pad_to_multiple_of`.

    Raises:
        ModelError: there is no exact way; says why and what works instead.
    """
    rank = count if form.gated else -(-count // 2)
    activation = constant_gate(form.activation)
    try:
        merge_plan = plan(model, ffns, form, rank, pad_to_multiple_of, steering=False, constant=activation is not None)
        constant = None if activation is None else merge_plan.width
    except ModelError:
        # Without biases token paths still have their slots; attributes have none.
        merge_plan, constant = plan(model, ffns, form, rank, pad_to_multiple_of, steering=False), None
    layers: dict[int, dict[str, Any]] = {ffn.layer: {} for ffn in ffns}
    for name, role in merge_plan.roles.items():
        module, modules = name.removesuffix(".weight"), layers[ffns[role.ffn].layer]
        if role.part in ("up", "key", "gate_up"):
            fused = role.part == "gate_up"
            offset = merge_plan.wider if fused and form.gate_first else 0
            modules.update(reads=module, offset=offset, rows=merge_plan.wider * (2 if fused else 1))
        elif role.part == "value":
            modules["writes"] = module
    slots = Slots(
        model="",
        revision=None,
        fingerprint=UNKNOWN,
        architecture=merge_plan.architecture,
        dtype=str(model.dtype).removeprefix("torch."),
        width=merge_plan.width,
        wider=merge_plan.wider,
        gated=form.gated,
        activation=activation or (0.0, 1.0),
        constant=constant,
        first=merge_plan.width + (constant is not None),
        suffixes=_suffixes(merge_plan, [[modules[end] for modules in layers.values()] for end in ("reads", "writes")]),
        layers={layer: LayerModules(**modules) for layer, modules in layers.items()},
    )
    return merge_plan, slots


def _suffixes(merge_plan: Plan, groups: list[list[str]]) -> list[str] | None:
    """For each group of modules the shortest ending that all of them share and no other module with a weight has."""
    modules = [name.removesuffix(".weight") for name in merge_plan.shapes if name.endswith(".weight")]
    found = []
    for group in groups:
        parts = group[0].split(".")
        endings = [".".join(parts[-length:]) for length in range(1, len(parts))]
        fits = [end for end in endings if {name for name in modules if name.endswith(f".{end}")} == set(group)]
        if not fits:
            return None
        found.append(fits[0])
    return found


def write_empty(
    folder: Path, model: torch.nn.Module, merge_plan: Plan, slots: Slots, ffns: list[FFN], report: Report = silent
) -> None:
    """Write weights and config of the base with slots into `folder`."""
    count, width = slots.wider - slots.width, ffns[0].hidden_size
    bias = torch.zeros(count)
    if slots.constant is not None:
        bias[slots.constant - slots.width] = 1.0 if slots.gated else slots.activation[0]
    gate = torch.full((count,), slots.activation[0] if slots.gated else 0.0)
    empty = Neurons(gate, torch.zeros(count, width), torch.zeros(width, count), None, bias)
    merge_plan.config.dtype = model.dtype
    write_checkpoint(folder, model, merge_plan, {ffn.layer: empty for ffn in ffns}, [ffn.layer for ffn in ffns], report)


def read_slots(folder: Path) -> Slots:
    """The record of a base with slots.

    Raises:
        ModelError: no such folder, or a damaged record, or one of another version.
    """
    path = folder / RECORD_FILE
    if not path_exists(path):
        hint = "Give a folder that braces export slots wrote."
        raise ModelError("no base with slots here", where=str(folder), hint=hint)
    raw = read(_ANY_RECORD, path)
    version = raw.get("format_version")
    if isinstance(version, bool) or version != FORMAT_VERSION:
        what = f"format version {cut(version)}, this braces reads {FORMAT_VERSION}"
        raise ModelError(what, where=str(path), hint="Export the slots again, or update braces.")
    return check(_RECORD, raw, str(path))
