"""An adapter, or attributes, as a plain LoRA: as peft reads it, and as a GGUF file.

With relevance to the output the adapter is a LoRA on the value projections of its base, and needs no slots:

    side path    W_V += B (A W_V), bias += B A bias           the scale weakens or strengthens the adapter
    attribute    bias += b                                    the scale is s; the bias is peft's `lora_bias`

With relevance to the input the LoRA is for a base with slots:

    side path    W_in += S A,      W_out += (B / act(c)) S^T      S selects the slots, so that they compute B (A h)
    attribute    W_out += (b / act(c)) e^T                        e selects the constant, b = B (A h_c)

Without a gate a slot is a pair of neurons that read A h and -A h, and writes B (act(A h) - act(-A h)) = B (A h).

An attribute's vector is linear in the LoRA's scale, so the scale is the strength s. A side path is quadratic in it and
exact at scale 1 only. Attributes add up with everything. Side paths add up if they use different slots: two on the same
slots would each write what the other one reads.
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from re import findall
from typing import Any

import torch
from torch import Tensor

from braces_cli.core.attributes.hooks import steered
from braces_cli.core.errors import BracesError, ConfigError, ModelError
from braces_cli.core.files import check_output_file, output_lock, write_atomic, write_json, write_tensors
from braces_cli.core.models.ffn import FFN
from braces_cli.core.models.hub import is_gguf
from braces_cli.core.models.identity import check_same_base
from braces_cli.core.models.load import DTYPES
from braces_cli.core.models.weights import dense
from braces_cli.core.progress import Report, silent
from braces_cli.export.checkpoint import SidePaths, ValueEdit, side_paths, steering_vectors, value_edits, write_model
from braces_cli.export.run import Opened, Request, copy_companions, run
from braces_cli.export.slots import Slots, read_slots
from braces_cli.export.verify import Reference, verify_export

_WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
# In the new folder until the verification: the adapter's LoRA, with which the LoRA of an attribute is verified, and the
# checkpoint of a GGUF file.
_ADAPTER_FOLDER, _BASE_FOLDER = "adapter", "base"
# Class -> architecture in GGUF, for classes whose value projections llama.cpp's converter neither renames nor changes.
_ARCHITECTURES = {
    "LlamaForCausalLM": "llama", "MistralForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3", "GemmaForCausalLM": "gemma", "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3", "Phi3ForCausalLM": "phi3", "Olmo2ForCausalLM": "olmo2",
}  # fmt: skip

# Module name -> (A, B); the change of its weight is B A.
Pairs = dict[str, tuple[Tensor, Tensor]]
# Module name -> change of its bias.
Biases = dict[str, Tensor]


@dataclass(frozen=True)
class Lora:
    """A LoRA to write; create it with `plan_lora`.

    Attributes:
        slots_dir: folder of the base with slots; None for the base itself, with relevance to the output.
        slots: its record.
        combine: adapter and attributes in one LoRA, at fixed strengths; otherwise attributes without the adapter.
        first_slot: number of ranks left for other adapters.
        rank: ranks of the adapter's side path in the LoRA; 0 without the side path.
    """

    request: Request
    slots_dir: Path | None
    slots: Slots | None
    combine: bool
    first_slot: int
    rank: int


def plan_lora(request: Request, slots_dir: Path | None, combine: bool = False, first_slot: int = 0) -> Lora:
    """Return the LoRA of a request; base, revision and dtype default to those of the slots.

    Raises:
        ConfigError: nothing to export, or more ranks than slots.
        ModelError: no base with slots, or it has no slot for an attribute.
    """
    adapter, attributes, options = request.adapter, request.attributes, request.options
    to_output = adapter is not None and adapter.config.relevance_to == "output"
    if to_output and (slots_dir is not None or first_slot):
        hint = "Leave them out; the LoRA is for the base itself."
        raise ConfigError("relevance to the output needs no slots", where="--base, --first-slot", hint=hint)
    if slots_dir is None and not to_output:
        hint = "Name a base with slots (braces export slots); only adapters with relevance to the output need none."
        raise ConfigError("missing option", where="--base", hint=hint)
    slots = None if slots_dir is None else read_slots(slots_dir)
    if adapter is None and not attributes:
        hint = "Give the adapter, the attribute, or both."
        raise ConfigError("missing option", where="--adapter, --attribute", hint=hint)
    if combine and (adapter is None or not attributes):
        raise ConfigError("needs an adapter and an attribute", where="--combine", hint="Name both, or leave it out.")
    rank = adapter.config.r if adapter is not None and (combine or not attributes) else 0
    if slots is None:
        return Lora(request, None, None, combine, 0, rank)
    if attributes and slots.constant is None:
        hint = "Merge the attribute instead, or export it with: braces export code."
        raise ModelError("this base has no constant slot for an attribute", where=str(slots_dir), hint=hint)
    needed = 0 if adapter is None else first_slot + adapter.config.r
    if needed > slots.rank:
        count = needed * (1 if slots.gated else 2) + slots.first - slots.width
        hint = f"Export the base again with at least --slots {count}."
        what = f"{needed} ranks are needed, more slots than the {slots.rank} of this base"
        raise ConfigError(what, where=str(slots_dir), hint=hint)
    if request.model is None:
        options = replace(options, revision=options.revision or slots.revision)
    if options.dtype == "auto":
        options = replace(options, dtype=slots.dtype)
    request = replace(request, model=request.model or slots.model, options=options)
    return Lora(request, slots_dir, slots, combine, first_slot, rank)


def export_lora(lora: Lora, gguf: Path | None = None, report: Report = silent) -> dict[str, Any]:
    """Write the LoRA folder, verified, then the GGUF file if one is named; returns what the command prints.

    Raises:
        ConfigError: an output exists, nothing is steered, or a package is not installed.
        ModelError: base and adapter do not fit, the verification fails, or a LoRA or its GGUF file is not possible.
        BracesError: the disk is full.
    """
    slots, base, output = lora.slots, lora.slots_dir, lora.request.output
    dtype = "" if slots is None else slots.dtype

    def write(opened: Opened, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
        nonlocal base, dtype
        session, adapter, model = opened.session, opened.session.adapter, opened.session.base.model
        with steered(session, opened.terms, opened.layers) as steering:
            if opened.terms and not steering:
                hint = "Give an --s other than 0, and --layers that can be steered."
                raise ConfigError("nothing is steered", where="--attribute", hint=hint)
            if slots is None:
                assert adapter is not None
                edits = list(value_edits(adapter, session.ffns, steering_vectors(steering)))
        if slots is None:
            base, name, dtype = session.base.checkpoint, session.base.name, str(model.dtype).removeprefix("torch.")
            if is_gguf(name):
                # Plain transformers reads less of such a file than braces does.
                base = folder / _BASE_FOLDER
                write_model(base, model)
                copy_companions(session, base)
            pairs, biases = value_pairs(model, edits, bool(lora.rank), bool(steering))
            if gguf is not None:
                check_gguf(type(model).__name__, biases)
            others = [] if lora.rank else [value_pairs(model, edits, True, False)]
        else:
            # The verification notices a base of the same sizes with other weights.
            hint = f"Use {slots.model}."
            check_same_base("the slots were exported from", slots.base, {}, session.base, "--model", hint)
            name = str(base)
            vectors = {each.layer: each.total[0] for each in steering}
            paths = {} if adapter is None else side_paths(adapter)
            pairs, biases = lora_pairs(paths if lora.rank else {}, vectors, slots, lora.first_slot), {}
            others = [(lora_pairs(paths, {}, slots), biases)] if paths and not lora.rank else []
        size = write_folder(folder, pairs, dtype, name, biases)
        for more in others:
            write_folder(folder / _ADAPTER_FOLDER, more[0], dtype, name, more[1])
        used = {"first_slot": lora.first_slot if lora.rank else None, "slots_used": lora.rank} if slots else {}
        facts = {"slots_dir": lora.slots_dir and str(lora.slots_dir), "combined": lora.combine, "dtype": dtype}
        architecture = type(model).__name__ if slots is None else slots.architecture
        return {**size, **facts, **used, "bias": bool(biases), "architecture": architecture}, {}

    def verify(folder: Path, expected: Reference) -> dict[str, Any]:
        assert base is not None
        loras = [path for path in (folder, folder / _ADAPTER_FOLDER) if path.is_dir()]
        if slots is not None:
            measured = verify_export(base, expected, loras=loras)
        else:
            measured = verify_export(base, expected, lora.request.options.trust_remote_code, loras, dtype)
        for temporary in (_ADAPTER_FOLDER, _BASE_FOLDER):
            shutil.rmtree(folder / temporary, ignore_errors=True)
        return measured

    inside = gguf is not None and output.resolve() in gguf.resolve().parents
    # The lock of the folder is also that of a file in it.
    with output_lock(None if inside else gguf):
        if gguf is not None:
            if slots is not None:
                check_gguf(slots.architecture)
            check_output_file(gguf, lora.request.overwrite)
        result = run("lora", lora.request, write, verify, report, [] if base is None else [base])
        if gguf is not None:
            write_gguf(gguf, output, result["architecture"], result["rank"])
            result["gguf"] = str(gguf)
    return result


@torch.no_grad()
def value_pairs(
    model: torch.nn.Module, edits: Sequence[ValueEdit], side_path: bool, steering: bool
) -> tuple[Pairs, Biases]:
    """The LoRA of relevance to the output on the value projections of `model`.

    Args:
        edits: from `value_edits`.
        side_path, steering: parts of the edits that the LoRA has.

    Raises:
        ModelError: experts share one weight, which is not a module that a LoRA can change.
    """
    names = {module: name for name, module in model.named_modules()}
    pairs: Pairs = {}
    biases: Biases = {}
    for edit in edits:
        if not isinstance(edit.part, FFN):
            what = f"the experts of layer {edit.layer} are one weight, which no server applies a LoRA to"
            raise ModelError(what, hint="Merge the adapter: braces merge.")
        name, d = names[edit.part.value], edit.part.hidden_size
        changes = [edit.turned] if side_path and edit.turned is not None else []
        changes += [edit.constant] if steering and edit.constant is not None else []
        if side_path:
            pairs[name] = (edit.a @ dense(edit.part.values()).float(), edit.b)
        elif changes:
            pairs[name] = torch.zeros(1, edit.part.value_vectors), torch.zeros(d, 1)
        if changes:
            biases[name] = torch.stack(changes).sum(dim=0)
    return pairs, biases


def lora_pairs(paths: SidePaths, vectors: dict[int, Tensor], slots: Slots, first: int = 0) -> Pairs:
    """The LoRA of side paths and of constant vectors, either of which may be empty.

    All pairs have the same rank, because some servers require it: that of the side paths, plus one with vectors.

    Args:
        vectors: added to the FFN output of each layer, (d,).
        first: number of ranks to skip.
    """
    path_rank = max((len(a) for a, _ in paths.values()), default=0)
    rank = path_rank + bool(vectors)
    # Selects the neurons of each direction: 1, and -1 for the second neuron of a pair.
    selected, ranks = torch.zeros(path_rank, slots.wider), torch.arange(path_rank)
    neurons = slots.first + (1 if slots.gated else 2) * (first + ranks)
    selected[ranks, neurons] = 1
    if not slots.gated:
        selected[ranks, neurons + 1] = -1
    pairs: Pairs = {}
    for layer in sorted({*paths, *vectors}):
        module_in, module_out = slots.layers[layer]
        d = len(vectors[layer]) if layer in vectors else len(paths[layer][1])
        selection, columns = torch.zeros(rank, slots.wider), torch.zeros(d, rank)
        if layer in paths:
            a, b = paths[layer]
            selection[:path_rank] = selected
            columns[:, :path_rank] = b / (slots.activation[1] if slots.gated else 1)
            inputs, rows = torch.zeros(rank, d), torch.zeros(slots.rows, rank)
            inputs[:path_rank] = a
            rows[slots.offset : slots.offset + slots.wider, :path_rank] = selected.mT
            pairs[module_in] = (inputs, rows)
        if layer in vectors:
            assert slots.constant is not None
            selection[path_rank, slots.constant] = 1
            columns[:, path_rank] = vectors[layer] / slots.activation[1]
        pairs[module_out] = (selection, columns)
    return pairs


def write_folder(
    folder: Path, pairs: Pairs, dtype_name: str, base: str, biases: Biases | None = None
) -> dict[str, int]:
    """Write the LoRA as peft reads it; returns rank, parameters and bytes.

    Args:
        dtype_name, base: dtype and name of the base, for the config.
    """
    dtype = DTYPES[dtype_name]
    rank = max((len(a) for a, _ in pairs.values()), default=0)
    tensors = {}
    for module, (a, b) in pairs.items():
        tensors[f"{_PREFIX}{module}.lora_A.weight"] = a.to(dtype)
        tensors[f"{_PREFIX}{module}.lora_B.weight"] = b.to(dtype)
        if biases:
            tensors[f"{_PREFIX}{module}.lora_B.bias"] = biases.get(module, b.new_zeros(len(b))).to(dtype)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": rank,  # so that scale 1 multiplies by 1
        "lora_dropout": 0.0,
        "target_modules": sorted(pairs),
        "bias": "none",
        "lora_bias": bool(biases),
        "inference_mode": True,
    }
    write_tensors(folder / _WEIGHTS_FILE, tensors)
    write_json(folder / "adapter_config.json", config)
    count = sum(tensor.numel() for tensor in tensors.values())
    return {"rank": rank, "parameters": count, "bytes": count * dtype.itemsize}


def check_gguf(architecture: str, biases: Biases | None = None) -> None:
    """Raise ModelError if a LoRA for a model of this class cannot be a GGUF file."""
    hint = "Leave --gguf out and use llama.cpp's convert_lora_to_gguf.py on the folder."
    if architecture not in _ARCHITECTURES:
        raise ModelError(f"{architecture} is not among {', '.join(_ARCHITECTURES)}", where="--gguf", hint=hint)
    if biases:
        what = "a GGUF LoRA has no biases, in which the value projection or the attribute is"
        hint = "Leave --attribute out, for which braces export control-vector writes a file, or use braces merge."
        raise ModelError(what, where="--gguf", hint=hint)


def write_gguf(path: Path, folder: Path, architecture: str, rank: int) -> None:
    """Write the LoRA in `folder` as llama.cpp's `convert_lora_to_gguf.py` does; its scale 1 multiplies by 1.

    Raises:
        BracesError: cannot be written.
    """
    import gguf
    from safetensors.torch import load_file

    name = _ARCHITECTURES[architecture]
    kind = next(kind for kind, text in gguf.MODEL_ARCH_NAMES.items() if text == name)
    stored, tensors = load_file(folder / _WEIGHTS_FILE), {}
    names = gguf.get_tensor_name_map(kind, 1 + max(int(number) for key in stored for number in findall(r"\d+", key)))
    for key, tensor in stored.items():
        module, _, end = key.removeprefix(_PREFIX).partition(".lora_")
        tensors[f"{names.get_name(module)}.weight.lora_{'a' if end == 'A.weight' else 'b'}"] = tensor.float()

    def add_header(writer: Any) -> None:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(rank))
        writer.add_file_type(gguf.LlamaFileType.ALL_F32)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)

    write_gguf_tensors(path, name, tensors, add_header)


def write_gguf_tensors(
    path: Path, architecture: str, tensors: dict[str, Tensor], add_header: Callable[[Any], object]
) -> None:
    """Write tensors in float32 to a GGUF file, atomically.

    Args:
        add_header: adds to the header, called with the writer of gguf.

    Raises:
        BracesError: cannot be written.
    """
    from gguf import GGUFReader, GGUFWriter

    def write(place: Path) -> None:
        writer = GGUFWriter(place, architecture)
        add_header(writer)
        for name, tensor in tensors.items():
            writer.add_tensor(name, tensor.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        # numpy, which writes the tensors, does not notice a full disk.
        try:
            stored = {tensor.name: torch.tensor(tensor.data.copy()) for tensor in GGUFReader(place).tensors}
        except (ValueError, IndexError):
            stored = {}
        if stored.keys() != tensors.keys() or not all(torch.equal(stored[name], tensors[name]) for name in tensors):
            raise BracesError("the file differs from the tensors", where=str(path), hint="Check the disk.")

    write_atomic(path, write)
