"""An adapter, or attributes, as the tensors of a LoRA on a base with slots.

    side path     W_in += S A,          W_out += (B / act(c)) S^T       S picks the slots, so that they compute B (A h)
    attribute      W_out += (b / act(c)) e^T                             e picks the constant slot, b = B (A h_c)

Without a gate a slot is a pair of neurons that read A h and -A h, and writes B (act(A h) - act(-A h)) = B (A h).

An attribute's vector is linear in the LoRA's scale, so the scale is the strength s. A side path is quadratic in it,
and is right at scale 1 only. Attributes add up with everything. Token paths add up where they use different slots:
two on the same slots would each write what the other one reads.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from braces_cli.core.method.adapter import Adapter
from braces_cli.core.models.ffn import FFN
from braces_cli.core.models.loading import DTYPES
from braces_cli.core.utils.atomic_files import write_json, write_tensors
from braces_cli.export.slots import LayerModules, Slots

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
