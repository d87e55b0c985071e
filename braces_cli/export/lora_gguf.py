"""A LoRA as a GGUF file, as llama.cpp's `convert_lora_to_gguf.py` writes it."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from braces_cli.core.utils.errors import ConfigError, ModelError
from braces_cli.export.gguf_files import write_gguf_tensors
from braces_cli.export.lora_tensors import Pairs
from braces_cli.export.slots import Slots

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
