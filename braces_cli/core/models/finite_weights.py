"""Numbers that are not finite: weights of a base that hold them, and what to do where a model computes them."""

from __future__ import annotations

from typing import Any

import torch

from braces_cli.core.utils.errors import ModelError

_KINDS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Where weights, adapter and attributes are finite, as was checked when they were read.
OVERFLOW_HINT = "Numbers grew too large: lower --s, or give --dtype float32 (bfloat16 where it is float16)."


def check_finite(model: Any, where: str) -> None:
    """Refuse a model with a weight that is NaN or infinite.

    Reads every weight once, which takes a small part of the time that loading it took: `aminmax` is many times faster
    than `isfinite`, and passes NaN on. Weights that are packed or not in memory are left out.

    Raises:
        ModelError: names the weight.
    """
    weights = {
        name: weight.detach()
        for name, weight in model.named_parameters()
        if weight.dtype in _KINDS and weight.numel() and not weight.is_meta
    }
    extremes: dict[torch.device, list[torch.Tensor]] = {}
    for weight in weights.values():
        low, high = torch.aminmax(weight)
        extremes.setdefault(weight.device, []).append(torch.stack([low, high]).double())
    # One wait for each device, not one for each weight.
    if all(bool(torch.stack(found).isfinite().all()) for found in extremes.values()):
        return
    name = next(name for name, weight in weights.items() if not all(x.isfinite() for x in torch.aminmax(weight)))
    what = f"the weight {name} holds numbers that are not finite (NaN or infinite)"
    raise ModelError(what, where=where, hint="The model is damaged: download it again, or train it at a lower rate.")
