"""How the output of an FFN joins the residual stream, measured by adding to it.

In most models what leaves the FFN is added unchanged, in some (Granite) times a constant; in others a norm is between
(Gemma 2) or behind the sum (BERT). Only in the first two kinds does a vector added to the FFN output move the layer's
output by a multiple of that vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from braces_cli.core.models.ffn import FFN, layer_stack
from braces_cli.core.models.module_structure import layer_output, with_layer_output

# How far the movement may be from a multiple of the vector, relative to that multiple: rounding of the residual stream.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2}
_BFLOAT16 = 5e-2
# Nearer to 1 than this, a measured factor is 1.
_ONE = {torch.float64: 1e-3, torch.float32: 1e-3}
_ONE_HALF = 5e-3


def residual_factors(model: Any, ffns: Sequence[FFN], ids: Tensor) -> list[float | None]:
    """What each FFN's output is multiplied by where it joins the residual stream; None where it joins in another way.

    A vector is added to the output of each FFN and looked for in the output of its layer, which is then put back, so
    that two passes measure all layers.

    Args:
        ids: tokens to measure with, (1, tokens), on the device of the input embedding.
    """
    stack = layer_stack(model)[1]
    steps: dict[int, Tensor] = {}
    plain: dict[int, Tensor] = {}
    moved: dict[int, Tensor] = {}

    def keep(layer: int) -> Any:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            plain[layer] = layer_output(output).clone()

        return hook

    def push(layer: int) -> Any:
        def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            return output + steps[layer].to(output)

        return hook

    def put_back(layer: int) -> Any:
        def hook(module: nn.Module, args: tuple, output: Any) -> Any:
            moved[layer] = layer_output(output)
            return with_layer_output(output, plain[layer])

        return hook

    with torch.no_grad():
        with ExitStack() as handles:
            for ffn in ffns:
                handles.callback(stack[ffn.layer].register_forward_hook(keep(ffn.layer)).remove)
            model(input_ids=ids, use_cache=False)
        noise = torch.randn(ffns[0].hidden_size, generator=torch.Generator().manual_seed(0))
        # As large as the residual stream, so that neither is lost in the rounding of the other.
        steps = {ffn.layer: noise * float(plain[ffn.layer].float().pow(2).mean().sqrt()) for ffn in ffns}
        with ExitStack() as handles:
            for ffn in ffns:
                handles.callback(ffn.value.register_forward_hook(push(ffn.layer)).remove)
                handles.callback(stack[ffn.layer].register_forward_hook(put_back(ffn.layer)).remove)
            model(input_ids=ids, use_cache=False)
    return [_factor(plain[ffn.layer], moved[ffn.layer], steps[ffn.layer]) for ffn in ffns]


def _factor(plain: Tensor, moved: Tensor, step: Tensor) -> float | None:
    """The c of moved = plain + c step, both (..., d); None where there is no such c."""
    change = (moved.float() - plain.float()).flatten(0, -2).cpu()
    factor = (change @ step).mean() / (step @ step)
    rest = (change - factor * step).norm(dim=1).max()
    # Not `rest > ...`: NaN must fail.
    if not rest <= _TOLERANCE.get(plain.dtype, _BFLOAT16) * factor.abs() * step.norm():
        return None
    if (factor - 1).abs() < _ONE.get(plain.dtype, _ONE_HALF):
        return 1.0
    exact = round(float(factor), 3)
    return exact if abs(exact - float(factor)) < 1e-4 else float(factor)
