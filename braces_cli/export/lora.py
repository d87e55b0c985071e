"""An adapter, or attributes, as the tensors of a LoRA on a base with slots.

    side path     W_in += S A,          W_out += (B / act(c)) S^T       S picks the slots, so that they compute B (A h)
    attribute      W_out += (b / act(c)) e^T                             e picks the constant slot, b = B (A h_c)

Without a gate a slot is a pair of neurons that read A h and -A h, and writes B (act(A h) - act(-A h)) = B (A h).

An attribute's vector is linear in the LoRA's scale, so the scale is the strength s. A side path is quadratic in it,
and is right at scale 1 only. Attributes add up with everything. Token paths add up where they use different slots:
two on the same slots would each write what the other one reads.

A LoRA as a GGUF file, as llama.cpp's `convert_lora_to_gguf.py` writes it.

Export an adapter, or attributes, as a plain LoRA for a base with slots, and prove it with peft.

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
from torch import Tensor

from braces_cli.core.adapter.model import Adapter
from braces_cli.core.attributes.files import read_header
from braces_cli.core.attributes.hooks import constants
from braces_cli.core.attributes.pooling import default_layers
from braces_cli.core.attributes.words import GRADIENT
from braces_cli.core.errors import ConfigError, ModelError
from braces_cli.core.files import check_output_file, output_lock, path_exists, write_json, write_tensors, write_text
from braces_cli.core.models.ffn import FFN
from braces_cli.core.models.identity import differences
from braces_cli.core.models.load import DTYPES
from braces_cli.core.models.options import parse_ranges
from braces_cli.core.progress import Report, silent
from braces_cli.core.versions import versions
from braces_cli.export.cards import lora_card
from braces_cli.export.checkpoint import check_output, new_folder, write_gguf_tensors
from braces_cli.export.request import Request, inputs, open_bare, sources, steering
from braces_cli.export.slots import LayerModules, Slots, read_slots
from braces_cli.export.verify import Loading, Reference, figures, reference, verify_export

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."

# Module name -> (A, B), the change of its weight being B A.
Pairs = dict[str, tuple[Tensor, Tensor]]


def side_path(adapter: Adapter) -> dict[int, tuple[Tensor, Tensor]]:
    """A (d_r, d) and B (d, d_r) of each layer of the adapter, in float32 on the CPU."""
    found = {}
    for ffn, adapter_layer in adapter.adapted_ffns:
        assert isinstance(ffn, FFN)
        with torch.no_grad():
            reads, writes = adapter_layer.factors(ffn.values(), torch.float32)
        found[ffn.layer] = (reads.cpu(), writes.cpu())
    return found


def lora_pairs(
    path: dict[int, tuple[Tensor, Tensor]], vectors: dict[int, Tensor], slots: Slots, first: int = 0
) -> Pairs:
    """The LoRA of a side path and of constant vectors, either of which may be empty.

    All pairs have one rank, which some servers expect: that of the side path, plus one where there are vectors.

    Args:
        path: A (d_r, d) and B (d, d_r) of each layer.
        vectors: what is added to the FFN's output at each layer (d,).
        first: slots that are left free before the first one used.
    """
    rank = max((len(reads) for reads, _ in path.values()), default=0)
    pairs: Pairs = {}
    for layer in sorted({*path, *vectors}):
        modules = slots.layers[layer]
        width = len(vectors[layer]) if layer in vectors else len(path[layer][1])
        selection = torch.zeros(rank + bool(vectors), slots.wider)
        columns = torch.zeros(width, rank + bool(vectors))
        if layer in path:
            reads, writes = path[layer]
            selection[:rank] = _selection(rank, slots, first)
            columns[:, :rank] = writes / (slots.activation[1] if slots.gated else 1)
            rows = torch.zeros(rank + bool(vectors), width)
            rows[:rank] = reads
            pairs[modules.reads] = (rows, _rows_of(selection[:rank], modules, rank + bool(vectors)))
        if layer in vectors:
            assert slots.constant is not None
            selection[rank, slots.constant] = 1
            columns[:, rank] = vectors[layer] / slots.activation[1]
        pairs[modules.writes] = (selection, columns)
    return pairs


def _selection(rank: int, slots: Slots, first: int) -> Tensor:
    """Which neurons each direction of a side path uses (rank, wider): 1, and -1 for the second one of a pair."""
    found = torch.zeros(rank, slots.wider)
    step = 1 if slots.gated else 2
    places = slots.first + step * (first + torch.arange(rank))
    found[torch.arange(rank), places] = 1
    if not slots.gated:
        found[torch.arange(rank), places + 1] = -1
    return found


def _rows_of(selection: Tensor, modules: LayerModules, rank: int) -> Tensor:
    """The selected neurons as rows of the module that reads (rows, rank), zeros beyond the side path."""
    found = torch.zeros(modules.rows, rank)
    found[modules.offset : modules.offset + selection.shape[1], : len(selection)] = selection.mT
    return found


def write_folder(folder: Path, pairs: Pairs, slots: Slots, base: Path) -> dict[str, Any]:
    """Write the LoRA as peft reads it, in the dtype of the base with slots; returns its rank, numbers and bytes.

    Args:
        base: folder of the base with slots; recorded only.
    """
    dtype = DTYPES[slots.dtype]
    tensors = {}
    for module, (a, b) in pairs.items():
        tensors[f"{_PREFIX}{module}.lora_A.weight"] = a.to(dtype)
        tensors[f"{_PREFIX}{module}.lora_B.weight"] = b.to(dtype)
    rank = len(next(iter(pairs.values()))[0])
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": rank,
        "lora_alpha": rank,  # so that scale 1 multiplies by 1
        "lora_dropout": 0.0,
        "target_modules": _targets(pairs, slots),
        "bias": "none",
        "inference_mode": True,
    }
    write_tensors(folder / WEIGHTS_FILE, tensors)
    write_json(folder / CONFIG_FILE, config)
    return lora_size(pairs, slots)


def lora_size(pairs: Pairs, slots: Slots) -> dict[str, Any]:
    """Rank, numbers and bytes of a LoRA."""
    count = sum(a.numel() + b.numel() for a, b in pairs.values())
    rank = max((len(a) for a, _ in pairs.values()), default=0)
    return {"rank": rank, "parameters": count, "bytes": count * DTYPES[slots.dtype].itemsize}


def _targets(pairs: Pairs, slots: Slots) -> list[str]:
    """Names of the modules for the config: endings such as `up_proj` where they mean exactly the pairs' modules."""
    if slots.suffixes is None:
        return sorted(pairs)
    layers = slots.layers.values()
    groups = zip(
        slots.suffixes, ({modules.reads for modules in layers}, {modules.writes for modules in layers}), strict=True
    )
    named = {suffix: group for suffix, group in groups if group <= set(pairs)}
    return list(named) if set().union(*named.values()) == set(pairs) else sorted(pairs)


def read_folder(folder: Path) -> Pairs:
    """The LoRA in `folder`, in the dtype that was written."""
    from safetensors.torch import load_file

    tensors = load_file(folder / WEIGHTS_FILE)
    ends = (".lora_A.weight", ".lora_B.weight")
    modules = [name.removeprefix(_PREFIX).removesuffix(ends[0]) for name in tensors if name.endswith(ends[0])]
    return {module: (tensors[_PREFIX + module + ends[0]], tensors[_PREFIX + module + ends[1]]) for module in modules}


# Class of the base with slots -> architecture in GGUF. Only classes whose LoRA was compared with the converter's.
ARCHITECTURES = {"LlamaForCausalLM": "llama"}


def check_gguf(slots: Slots) -> None:
    """See that a GGUF file can be written for this base.

    Raises:
        ConfigError: the package gguf is missing.
        ModelError: names of this architecture in GGUF are not known here.
    """
    if find_spec("gguf") is None:
        hint = "Install it with: pip install gguf"
        raise ConfigError("the export needs the package gguf", where="--gguf", hint=hint)
    if slots.architecture not in ARCHITECTURES:
        hint = "Leave --gguf out and use llama.cpp's convert_lora_to_gguf.py on the folder."
        known = ", ".join(ARCHITECTURES)
        raise ModelError(f"{slots.architecture} is not among {known}", where="--gguf", hint=hint)


def write_gguf(path: Path, pairs: Pairs, slots: Slots) -> None:
    """Write the LoRA to `path`; its scale 1 multiplies by 1.

    Raises:
        BracesError: cannot be written.
    """
    import gguf

    name = ARCHITECTURES[slots.architecture]
    architecture = next(kind for kind, text in gguf.MODEL_ARCH_NAMES.items() if text == name)
    names = gguf.get_tensor_name_map(architecture, max(slots.layers) + 1)
    tensors = {}
    for module, (a, b) in pairs.items():
        stored = names.get_name(module)
        assert stored is not None, module
        tensors[f"{stored}.weight.lora_a"] = a.float()
        tensors[f"{stored}.weight.lora_b"] = b.float()
    rank = len(next(iter(pairs.values()))[0])

    def describe(writer: Any) -> None:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(rank))
        writer.add_file_type(gguf.LlamaFileType.ALL_F32)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)

    write_gguf_tensors(path, name, tensors, describe)


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
    words = differences(slots.fingerprint, session.base.fingerprint, "the slots'")
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
