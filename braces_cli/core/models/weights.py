"""Value matrices that are not plain tensors (packed by quantisation, offloaded by accelerate), and non-finite weights.

Products with W_V need a dense tensor. A plain weight is used as a view. For any other, `StoredValues` makes a dense
copy of one layer for one product: d x d_ff numbers in the weight's dtype, never cached. Matrices are unpacked by the
routine of the packing, chosen by measurement: W W^T x with 16 columns at the shapes of Qwen2.5-1.5B (1,536 x 8,960,
bfloat16, one thread) takes 20 ms dense, 31 ms with bitsandbytes 4-bit, 37 ms with 8-bit, 108 ms with torchao int8; unit
vectors through the module take over 20 s, and are the last resort.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from braces_cli.core.errors import ModelError

# Unit vectors that pass through a module at a time if nothing else unpacks it.
_BLOCK = 512


@dataclass(frozen=True, eq=False)
class StoredValues:
    """W_V of a value projection whose weight is packed or offloaded."""

    module: nn.Module

    @property
    def device(self) -> torch.device:
        """Device that the module runs on; an offloaded weight is stored elsewhere."""
        return compute_device(self.module)

    @property
    def is_offloaded(self) -> bool:
        """Return whether accelerate stores the weight on the CPU or on disk."""
        return _is_offloaded(self.module)

    @property
    def key(self) -> tuple[int, ...]:
        """Identity of the weight, as addresses of its tensors."""
        return tuple(t.data_ptr() for part in _direct_tensors(self.module) for t in _plain_parts(part))

    def dense(self) -> Tensor:
        """W_V (d, d_ff) as a temporary copy; do not keep a reference."""
        with torch.no_grad(), _loaded_weight(self.module):
            dense = _unpack(self.module)
        if dense.is_meta:
            raise ModelError("a value matrix has no weights: it is on the meta device", where=repr(self.module))
        return dense


Values = Tensor | StoredValues


def stored_values(module: nn.Module) -> Values:
    """W_V (d, d_ff) of a value projection: a view of a plain weight, else a `StoredValues`."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or not _is_plain(weight) or _is_offloaded(module):
        return StoredValues(module)
    # Conv1D of GPT-2 stores (inputs, outputs).
    return weight if hasattr(module, "out_features") else weight.T


def dense(values: Values) -> Tensor:
    """W_V (d, d_ff) as a plain tensor: the weight, or a temporary copy."""
    return values if isinstance(values, Tensor) else values.dense()


def is_packed(module: nn.Module) -> bool:
    """Return whether the weight of a linear module is not a plain floating-point tensor."""
    weight = getattr(module, "weight", None)
    return not (isinstance(weight, Tensor) and _is_plain(weight))


def _is_plain(weight: Tensor) -> bool:
    """Return whether a weight has at least 16-bit floats: not integers, not float8, not a packing subclass.

    A DTensor (with `full_tensor`) is a plain weight that is sharded. Reads the class, because torch.compile can trace
    that.
    """
    kind, dtype = type(weight), weight.dtype
    if not dtype.is_floating_point or dtype.itemsize == 1:
        return False
    if kind is nn.Parameter or kind is Tensor:
        return True
    wrapped = hasattr(kind, "__tensor_flatten__") and not hasattr(kind, "full_tensor")
    return not wrapped and getattr(weight, "quant_state", None) is None


def _is_offloaded(module: nn.Module) -> bool:
    # Runs in every forward pass: getattr is slow if the module does not have the attribute.
    return "_hf_hook" in module.__dict__ and bool(getattr(module._hf_hook, "offload", False))


def compute_device(module: nn.Module) -> torch.device:
    """Device that a module with tensors runs on; an offloaded weight is stored elsewhere."""
    hook: Any = getattr(module, "_hf_hook", None)
    if _is_offloaded(module):
        return torch.device(hook.execution_device)
    # A module that peft wraps has the tensors in its children.
    return next(chain(_direct_tensors(module), module.parameters())).device


def stored_bias(module: nn.Module) -> Tensor | None:
    """Bias of a projection, None if there is none; a copy of an offloaded bias."""
    with _loaded_weight(module):
        bias = getattr(module, "bias", None)
        return None if bias is None else bias.detach()


def _loaded_weight(module: nn.Module) -> AbstractContextManager[None]:
    """Load the weight of an offloaded module inside the `with` block."""
    if not _is_offloaded(module):
        return nullcontext()
    from accelerate.utils import align_module_device

    return cast("AbstractContextManager[None]", align_module_device(module))


def _direct_tensors(module: nn.Module) -> Any:
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)


def _plain_parts(tensor: Tensor) -> list[Tensor]:
    """Tensors inside a packing subclass."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    names, _ = cast("Any", tensor).__tensor_flatten__()
    return [part for name in names for part in _plain_parts(getattr(tensor, name))]


def _unpack(module: nn.Module) -> Tensor:
    part: Any = module
    weight: Any = getattr(module, "weight", None)
    if isinstance(weight, Tensor):
        if _is_plain(weight):
            return weight.detach() if hasattr(module, "out_features") else weight.detach().T
        if (state := getattr(weight, "quant_state", None)) is not None:
            from bitsandbytes import functional

            return cast("Tensor", functional.dequantize_4bit(weight.data, state))
        if hasattr(weight, "SCB"):
            from bitsandbytes import functional

            # The first forward pass moves the scales from the weight to the module.
            scales = weight.SCB if weight.SCB is not None else part.state.SCB
            return cast("Tensor", functional.int8_vectorwise_dequant(weight.data, scales))
        if type(weight).dequantize is not Tensor.dequantize:  # torchao, quanto
            return weight.dequantize()
    if callable(getattr(part, "dequantize", None)):  # hqq
        return cast("Tensor", part.dequantize())
    return _through_module(module)


def _through_module(module: nn.Module) -> Tensor:
    """W from the module's outputs for unit vectors, for an unknown packing.

    Calls `forward`, so that no hooks run.
    """
    part: Any = module
    first = next(_direct_tensors(module))
    floats = (t.dtype for t in _direct_tensors(module) if t.dtype.is_floating_point and t.dtype.itemsize > 1)
    dtype = getattr(part, "compute_dtype", None) or next(floats, torch.bfloat16)
    blocks = []
    zero = part.forward(torch.zeros(1, part.in_features, dtype=dtype, device=first.device))
    for start in range(0, part.in_features, _BLOCK):
        count = min(_BLOCK, part.in_features - start)
        units = torch.zeros(count, part.in_features, dtype=dtype, device=first.device)
        units[range(count), range(start, start + count)] = 1
        blocks.append((part.forward(units) - zero).mT)
    return torch.cat(blocks, dim=1)


_KINDS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Hint for non-finite results; weights, adapters and attributes were checked when they were read.
OVERFLOW_HINT = "Numbers grew too large: lower --s, or give --dtype float32 (bfloat16 where it is float16)."


def double(tensor: Tensor) -> Tensor:
    """Return `tensor` in float64, on the CPU if its device (mps) has no float64."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def check_finite(weights: Mapping[str, Tensor], where: str) -> None:
    """Refuse weights that are NaN or infinite; packed weights and those not in memory are not read.

    Takes a small part of the time of loading: `aminmax` is many times faster than `isfinite`, and propagates NaN.

    Args:
        weights: by name.
        where: model or adapter of the weights.
    """
    read = {
        name: weight
        for name, weight in ((name, weight.detach()) for name, weight in weights.items())
        # Packed weights are subclasses of Tensor, with a dtype such as bfloat16.
        if type(weight) is Tensor and weight.dtype in _KINDS and weight.numel() and not weight.is_meta
    }
    extremes: dict[torch.device, list[Tensor]] = {}
    for weight in read.values():
        extremes.setdefault(weight.device, []).append(double(torch.stack(torch.aminmax(weight))))
    # One synchronisation per device, not one per weight.
    if all(bool(torch.stack(found).isfinite().all()) for found in extremes.values()):
        return
    name = next(name for name, weight in read.items() if not torch.stack(torch.aminmax(weight)).isfinite().all())
    what = f"the weight {name} holds numbers that are not finite (NaN or infinite)"
    raise ModelError(what, where=where, hint="The file is damaged: download it again, or train at a lower rate.")
