"""`--quantize`: which packing, in the words of transformers' own quantisation configs.

    int8       torchao, 8 bits a weight, a scale for each row: any device
    bnb-8bit   bitsandbytes LLM.int8()
    bnb-4bit   bitsandbytes NF4, half a byte a weight; computes in the base's dtype

The base is packed while it is loaded, all but embeddings and head. An adapter knows nothing of it.
"""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from braces_cli.core.models.value_weights import is_packed
from braces_cli.core.utils.errors import ConfigError


def check_quantize(name: str, device: torch.device | None) -> None:
    """See that the backend of `name` is installed and runs on `device` (None: wherever it is put).

    Raises:
        ConfigError: it is not.
    """
    package = "bitsandbytes" if name.startswith("bnb-") else "torchao"
    if find_spec(package) is None:
        hint = "Install it with: pip install 'braces-cli[quantize]'"
        raise ConfigError(f"`{name}` needs the package {package}", where="--quantize", hint=hint)
    if package == "bitsandbytes" and device is not None:
        import bitsandbytes

        # Releases before those that name their devices know CUDA only.
        there = getattr(bitsandbytes, "supported_torch_devices", {"cuda"})
        if device.type not in there:
            raise ConfigError(
                f"this bitsandbytes runs on {', '.join(sorted(there))}, not on {device.type}",
                where="--quantize",
                hint="Use --quantize int8 (torchao), or a GPU with CUDA.",
            )


def check_packed(name: str, model: nn.Module) -> None:
    """See that loading packed something.

    Raises:
        ConfigError: nothing, which torchao does not say of a model without `nn.Linear`.
    """
    if not any(is_packed(module) for module in model.modules() if hasattr(module, "in_features")):
        raise ConfigError(
            f"`{name}` packs nothing in {type(model).__name__}",
            where="--quantize",
            hint="Use bnb-8bit or bnb-4bit, which also know GPT-2's layers, or leave --quantize out.",
        )


def quantization_config(name: str, dtype: torch.dtype) -> Any:
    """What `from_pretrained` takes as `quantization_config`.

    Args:
        name: one of `QUANTISATIONS`, checked.
        dtype: of the base.
    """
    import transformers

    if name.startswith("bnb-"):
        # It reports every single product whose input it casts.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        if name == "bnb-8bit":
            return transformers.BitsAndBytesConfig(load_in_8bit=True)
        return transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    import torchao.quantization as torchao

    return transformers.TorchAoConfig(torchao.Int8WeightOnlyConfig(version=2))
