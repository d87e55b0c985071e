"""Export an adapter, or attributes, as a plain LoRA for a base with slots, and prove it with peft.

What is in the LoRA is decided in `lora_tensors`, its GGUF form in `lora_gguf`. Here is the order: check, open the base,
reference logits, write into a folder beside the output, let go of the base, prove on the base with slots, rename.
"""

from __future__ import annotations

import gc
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from braces_cli.core.attributes.attribute_header import read_header
from braces_cli.core.attributes.intervention import constants
from braces_cli.core.attributes.push_sizes import default_layers
from braces_cli.core.attributes.word_lists import GRADIENT
from braces_cli.core.models.fingerprint import differences
from braces_cli.core.models.layer_ranges import parse_ranges
from braces_cli.core.utils.atomic_files import check_output_file, write_json, write_text
from braces_cli.core.utils.errors import ConfigError, ModelError
from braces_cli.core.utils.output_lock import output_lock
from braces_cli.core.utils.paths import path_exists
from braces_cli.core.utils.progress import Report, silent
from braces_cli.core.utils.versions import versions
from braces_cli.export.lora_gguf import check_gguf, write_gguf
from braces_cli.export.lora_tensors import lora_pairs, lora_size, read_folder, side_path, write_folder
from braces_cli.export.model_card import lora_card
from braces_cli.export.output_folder import check_output, new_folder
from braces_cli.export.request import Request, inputs, open_bare, sources, steering
from braces_cli.export.slots import Slots, read_slots
from braces_cli.export.verification import Loading, Reference, figures, reference, verify_export

RECORD_FILE = "braces_lora.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class LoraRequest:
    """What is to be exported, and for which base.

    Attributes:
        request: base, adapter, attributes; `pad_to_multiple_of` is not used.
        slots: folder of the base with slots.
        combine: adapter and attributes in one LoRA, at fixed strengths; else attributes are one of their own.
        first_slot: how many ranks are left for other adapters before this one's slots.
    """

    request: Request
    slots: Path
    combine: bool = False
    first_slot: int = 0

    @property
    def with_side_path(self) -> bool:
        """Whether the LoRA holds the adapter's side path."""
        return self.request.adapter is not None and (self.combine or not self.request.attributes)


def write_lora(
    lora_request: LoraRequest, output: Path, gguf: Path | None = None, overwrite: bool = False, report: Report = silent
) -> dict[str, Any]:
    """Write the LoRA folder, proved, and the GGUF file where one is named; returns what the command prints.

    Raises:
        ConfigError: nothing to export, more ranks than slots, an output that is there already, or a package is missing.
        ModelError: base, slots and adapter do not fit, or the proof fails; nothing is left behind.
        BracesError: the disk is full.
    """
    slots = read_slots(lora_request.slots)
    lora_request = _completed(lora_request, slots)
    _check(lora_request, slots)
    check_output(output, overwrite, [*inputs(lora_request.request), lora_request.slots])
    if gguf is not None:
        check_gguf(slots)
        check_output_file(gguf, overwrite)
    inside = gguf is not None and output.resolve() in gguf.resolve().parents
    with ExitStack() as stack:
        # In the folder, the file appears with it, under its lock.
        stack.enter_context(output_lock(None if inside else gguf))
        folder = stack.enter_context(new_folder(output, overwrite))
        facts, expected, loras = _write(lora_request, slots, folder, stack, report)
        # The base is gone from memory: the proof loads the one with slots in a process of its own.
        gc.collect()
        report("proving", 0, 1)
        proof = verify_export(lora_request.slots, expected, Loading("base and adapter with this LoRA", loras=loras))
        report("proving", 1, 1)
        result = {**facts, **figures(proof)}
        write_json(folder / RECORD_FILE, {"format_version": FORMAT_VERSION, **result, "versions": versions()})
        write_text(folder / "README.md", lora_card(result))
        if gguf is not None:
            place = folder / gguf.resolve().relative_to(output.resolve()) if inside else gguf
            write_gguf(place, read_folder(folder), slots)
            result["gguf"] = str(gguf)
    return {"output_dir": str(output), **result}


def describe_lora(lora_request: LoraRequest) -> dict[str, Any]:
    """What would be written, from the records of slots and adapter; loads no weights.

    Raises:
        ConfigError, ModelError: as `write_lora`, as far as it can be told without the base.
    """
    slots = read_slots(lora_request.slots)
    _check(lora_request, slots)
    request, width = lora_request.request, int(slots.fingerprint["hidden_size"])
    path = {}
    if lora_request.with_side_path and request.adapter is not None:
        rank = request.adapter.config.r
        path = {layer: (torch.empty(rank, width), torch.empty(width, rank)) for layer in request.adapter.config.layers}
    steered = {layer for name, s in request.attributes.items() if s for layer in _layers_of(name, request, slots)}
    vectors = {layer: torch.empty(width) for layer in steered}
    return lora_size(lora_pairs(path, vectors, slots, lora_request.first_slot), slots)


def _layers_of(name: str, request: Request, slots: Slots) -> list[int]:
    """Decoder layers that an attribute steers, by the header of its file; a built-in list counts as one that pushes."""
    adapter = request.adapter
    folders = (request.attributes_dir, None if adapter is None else adapter.folder)
    places = [folder / f"{name}.safetensors" for folder in folders if folder is not None]
    file = next(filter(path_exists, places), None)
    details = read_header(file).details.get(name, {}) if file is not None else {}
    is_steering_vector = details.get("provenance", {}).get("reduction") == GRADIENT if file is not None else True
    if adapter is not None and file is None and name in adapter.config.attributes:
        is_steering_vector = False
    layers = sorted(slots.layers)
    chosen = None if request.layers is None else parse_ranges(request.layers, layers[-1] + 1, "--layers")
    if adapter is not None and not is_steering_vector:
        return [layer for layer in adapter.config.layers if chosen is None or layer in chosen]
    return details.get("steered_layers") or default_layers(layers) if chosen is None else chosen


def _completed(lora_request: LoraRequest, slots: Slots) -> LoraRequest:
    """The request with the base and the dtype that the slots were made of, where none are named."""
    request = lora_request.request
    options = request.options
    if request.model is None:
        options = replace(options, revision=options.revision or slots.revision)
        request = replace(request, model=slots.model)
    if options.dtype == "auto":
        options = replace(options, dtype=slots.dtype)
    return replace(lora_request, request=replace(request, options=options))


def _check(lora_request: LoraRequest, slots: Slots) -> None:
    """Everything that can be seen before the base is loaded."""
    request = lora_request.request
    if find_spec("peft") is None:
        hint = "Install it with: pip install peft"
        raise ConfigError("the proof of a LoRA needs the package peft", where="braces export lora", hint=hint)
    if request.adapter is None and not request.attributes:
        hint = "Give the adapter, the attribute, or both."
        raise ConfigError("missing option", where="--adapter, --attribute", hint=hint)
    if lora_request.combine and (request.adapter is None or not request.attributes):
        raise ConfigError("needs an adapter and an attribute", where="--combine", hint="Name both, or leave it out.")
    if request.attributes and slots.constant is None:
        hint = "Merge the attribute instead, or export it with: braces export code."
        raise ModelError("this base has no constant slot for an attribute", where=str(lora_request.slots), hint=hint)
    if request.attributes and not any(request.attributes.values()):
        hint = "The LoRA holds the attribute at this strength; the server's scale multiplies it."
        raise ConfigError("nothing is steered at strength 0", where="--s", hint=hint)
    if request.adapter is None:
        return
    words = differences(request.adapter.config.fingerprint, slots.fingerprint)
    if words:
        hint = f"Export slots of its own base: {request.adapter.config.base_model_name_or_path}."
        what = f"these slots belong to another base than the adapter ({'; '.join(words)})"
        raise ModelError(what, where=str(lora_request.slots), hint=hint)
    rank = request.adapter.config.r
    if lora_request.first_slot + rank > slots.rank:
        hint = f"Export the base again with at least --slots {_needed(lora_request.first_slot + rank, slots)}."
        what = (
            f"rank {rank} behind slot {lora_request.first_slot} needs more slots than the {slots.rank} that there are"
        )
        raise ConfigError(what, where=str(lora_request.slots), hint=hint)


def _needed(rank: int, slots: Slots) -> int:
    return rank * (1 if slots.gated else 2) + slots.first - slots.width


def _write(
    lora_request: LoraRequest, slots: Slots, folder: Path, stack: ExitStack, report: Report
) -> tuple[dict[str, Any], Reference, list[tuple[Path, float]]]:
    """Everything that needs the base in memory; it is let go of on return.

    Returns:
        What was written, the logits it must give, and the LoRA folders with scales that must give them together.
    """
    request = lora_request.request
    report("loading", 0, 1)
    session = open_bare(request)
    words = differences(slots.fingerprint, session.base.fingerprint(session.ffns), "the slots'")
    if words:
        hint = f"They were exported from {slots.model}."
        raise ModelError(f"the base differs from that of the slots ({'; '.join(words)})", where="--model", hint=hint)
    terms, layers = steering(session, request)
    if request.adapter is not None:
        session.add_adapter(request.adapter)
    report("loading", 1, 1)
    expected = reference(session, terms, layers)
    vectors = constants(session, terms, layers)
    if terms and not vectors:
        raise ConfigError(
            "nothing is steered", where="--attribute", hint="None of the layers in --layers can be steered."
        )
    path = side_path(session.adapter) if session.adapter is not None else {}
    pairs = lora_pairs(path if lora_request.with_side_path else {}, vectors, slots, lora_request.first_slot)
    facts = write_folder(folder, pairs, slots, lora_request.slots)
    loras = [(folder, 1.0)]
    if path and not lora_request.with_side_path:
        # An attribute of an adapter is held to the two together, so its adapter is needed, too. It is written inside,
        # and gone before the folder gets its name: what a killed process leaves of the folder is removed with it.
        adapter_folder = Path(stack.enter_context(TemporaryDirectory(dir=folder)))
        write_folder(adapter_folder, lora_pairs(path, {}, slots), slots, lora_request.slots)
        loras.append((adapter_folder, 1.0))
    used = request.adapter.config.r if lora_request.with_side_path and request.adapter is not None else 0
    facts |= {
        "slots_dir": str(lora_request.slots),
        **sources(request),
        "combined": lora_request.combine,
        "first_slot": lora_request.first_slot if used else None,
        "slots_used": used,
        "dtype": slots.dtype,
    }
    return facts, expected, loras
