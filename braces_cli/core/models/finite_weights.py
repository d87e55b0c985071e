"""Numbers that are not finite: weights of a base that hold them, and what to do where a model computes them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from braces_cli.core.utils.errors import ModelError

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
