"""A value matrix that is no plain tensor: packed by quantisation, or kept on the CPU or on disk by accelerate.

What multiplies by W_V wants it dense. A plain weight is used where it lies, as a view. For any other, `StoredValues`
makes a dense copy for the duration of one product: d x d_ff numbers in the weight's own dtype, of one layer at a time,
never kept. Whole matrices are unpacked by the packing's own routine, chosen by measurement: for W W^T x with 16
columns at Qwen2.5-1.5B shapes (1,536 x 8,960, bfloat16, one thread) dense 20 ms, bitsandbytes 4-bit 31 ms, 8-bit 37 ms,
torchao int8 108 ms; unit vectors sent through the module take over 20 s, and are the last resort.

Numbers that are not finite: weights of a base that hold them, and what to do where a model computes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from braces_cli.core.errors import ModelError

# Inputs of the value projection that go through the module at a time, where nothing else unpacks it.
_BLOCK = 512


@dataclass(frozen=True, eq=False)
class StoredValues:
    """W_V of a value projection whose weight cannot be multiplied with as it is."""

    module: nn.Module

    @property
    def device(self) -> torch.device:
        """Where the module runs, which for an offloaded weight is not where it is kept."""
        return compute_device(self.module)

    @property
    def is_offloaded(self) -> bool:
        """Whether accelerate keeps the weight on the CPU or on disk."""
        return _is_offloaded(self.module)

    @property
    def key(self) -> tuple[int, ...]:
        """Changes when the module gets another weight."""
        return tuple(t.data_ptr() for part in _own_tensors(self.module) for t in _plain_parts(part))

    def dense(self) -> Tensor:
        """W_V (d, d_ff), a fresh tensor: drop it after use."""
        with torch.no_grad(), at_hand(self.module):
            dense = _unpack(self.module)
        if dense.is_meta:
            raise ModelError("a value matrix has no weights: it is on the meta device", where=repr(self.module))
        return dense


Values = Tensor | StoredValues


def stored_values(module: nn.Module) -> Values:
    """W_V (d, d_ff) of a value projection: a view of its weight, or what makes a dense copy where there is no view."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or not _is_plain(weight) or _is_offloaded(module):
        return StoredValues(module)
    return _oriented(module, weight)


def dense(values: Values) -> Tensor:
    """W_V (d, d_ff) as a plain tensor: the weight itself, or a copy to be dropped after use."""
    return values if isinstance(values, Tensor) else values.dense()


def is_packed(module: nn.Module) -> bool:
    """Whether a linear module holds something else than a plain floating-point weight."""
    weight = getattr(module, "weight", None)
    return not (isinstance(weight, Tensor) and _is_plain(weight))


def _is_plain(weight: Tensor) -> bool:
    """A matrix of at least 16-bit floats: no integers, no float8 with its scale elsewhere, no packing subclass.

    A DTensor (which has `full_tensor`) only says where a plain weight lies. The class is asked, not the tensor, because
    that is what a compiler can follow.
    """
    kind, dtype = type(weight), weight.dtype
    if not dtype.is_floating_point or dtype.itemsize == 1:
        return False
    if kind is nn.Parameter or kind is Tensor:
        return True
    wrapped = hasattr(kind, "__tensor_flatten__") and not hasattr(kind, "full_tensor")
    return not wrapped and getattr(weight, "quant_state", None) is None


def _oriented(module: nn.Module, weight: Tensor) -> Tensor:
    """Weight as (outputs, inputs); transformers' Conv1D, which GPT-2 uses, stores it transposed."""
    return weight if hasattr(module, "out_features") else weight.T


def _is_offloaded(module: nn.Module) -> bool:
    # Not getattr, which is slow where a module has no such attribute; this is asked in every forward pass.
    return "_hf_hook" in module.__dict__ and bool(getattr(module._hf_hook, "offload", False))


def compute_device(module: nn.Module) -> torch.device:
    """Where a module with tensors of its own runs; an offloaded weight is kept elsewhere."""
    hook: Any = getattr(module, "_hf_hook", None)
    return torch.device(hook.execution_device) if _is_offloaded(module) else next(_own_tensors(module)).device


def stored_bias(module: nn.Module) -> Tensor | None:
    """The bias of a projection, None where it has none; a copy where the bias is offloaded."""
    with at_hand(module):
        bias = getattr(module, "bias", None)
        return None if bias is None else bias.detach()


def at_hand(module: nn.Module) -> AbstractContextManager[None]:
    """Inside, the module has its weight, wherever accelerate keeps it otherwise."""
    if not _is_offloaded(module):
        return nullcontext()
    from accelerate.utils import align_module_device

    return cast("AbstractContextManager[None]", align_module_device(module))


def _own_tensors(module: nn.Module) -> Any:
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)


def _plain_parts(tensor: Tensor) -> list[Tensor]:
    """The tensors that a packing subclass is made of."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    names, _ = cast("Any", tensor).__tensor_flatten__()
    return [part for name in names for part in _plain_parts(getattr(tensor, name))]


def _unpack(module: nn.Module) -> Tensor:
    part: Any = module
    weight: Any = getattr(module, "weight", None)
    if isinstance(weight, Tensor):
        if _is_plain(weight):
            return _oriented(module, weight.detach())
        if hasattr(weight, "quant_state") or hasattr(weight, "SCB"):
            return _unpack_bitsandbytes(part)
        if type(weight).dequantize is not Tensor.dequantize:  # torchao, quanto
            return weight.dequantize()
    if callable(getattr(part, "dequantize", None)):  # hqq
        return cast("Tensor", part.dequantize())
    return _through_module(module)


def _unpack_bitsandbytes(module: Any) -> Tensor:
    from bitsandbytes import functional

    weight = module.weight
    if getattr(weight, "quant_state", None) is not None:
        return cast("Tensor", functional.dequantize_4bit(weight.data, weight.quant_state))
    # The first forward pass moves the scales from the weight to the module.
    scales = weight.SCB if weight.SCB is not None else module.state.SCB
    return cast("Tensor", functional.int8_vectorwise_dequant(weight.data, scales))


def _through_module(module: nn.Module) -> Tensor:
    """W from what the module makes of unit vectors, for a packing that nothing above knows.

    `forward` and not the call, so that hooks, ours among them, stay out of it.
    """
    part: Any = module
    first = next(_own_tensors(module))
    floats = (t.dtype for t in _own_tensors(module) if t.dtype.is_floating_point and t.dtype.itemsize > 1)
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
# Where weights, adapter and attributes are finite, as was checked when they were read.
OVERFLOW_HINT = "Numbers grew too large: lower --s, or give --dtype float32 (bfloat16 where it is float16)."


def check_finite(weights: Mapping[str, Tensor], where: str) -> None:
    """Refuse weights that are NaN or infinite.

    Reads every weight once, which takes a small part of the time that loading it took: `aminmax` is many times faster
    than `isfinite`, and passes NaN on. Weights that are packed or not in memory are left out.

    Args:
        weights: by name.
        where: the model or adapter that they belong to.

    Raises:
        ModelError: names the weight.
    """
    plain = {name: weight.detach() for name, weight in weights.items()}
    read = {
        name: weight
        for name, weight in plain.items()
        # Packed weights are of classes of their own, and call themselves bfloat16.
        if type(weight) is Tensor and weight.dtype in _KINDS and weight.numel() and not weight.is_meta
    }
    extremes: dict[torch.device, list[Tensor]] = {}
    for weight in read.values():
        extremes.setdefault(weight.device, []).append(torch.stack(torch.aminmax(weight)).double())
    # One wait for each device, not one for each weight.
    if all(bool(torch.stack(found).isfinite().all()) for found in extremes.values()):
        return
    name = next(name for name, weight in read.items() if not torch.stack(torch.aminmax(weight)).isfinite().all())
    what = f"the weight {name} holds numbers that are not finite (NaN or infinite)"
    raise ModelError(what, where=where, hint="The file is damaged: download it again, or train at a lower rate.")
