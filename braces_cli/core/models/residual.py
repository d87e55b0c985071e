"""Measure how the output of an FFN joins the residual stream, by adding a vector to that output.

Most models add the FFN output unchanged, some (Granite) multiply it by a constant first. Others have a norm between
(Gemma 2) or after the sum (BERT): a vector added to the FFN output then does not move the layer's output by a multiple
of that vector.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from braces_cli.core.models.ffn import FFN, MixtureFFN, layer_stack
from braces_cli.core.models.structure import add_to_output, layer_output, with_layer_output

# Largest distance of a movement from a multiple of the vector, relative to that multiple: rounding of the stream.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2}
_TOLERANCE_BFLOAT16 = 5e-2
# A measured factor this close to 1 is 1.
_ONE = {torch.float64: 1e-3, torch.float32: 1e-3}
_ONE_HALF = 5e-3
# Size of the vector in `residual_gains`: small enough for the linear range, large enough for half precision.
GAIN_STEP = 0.3


def residual_factors(model: Any, ffns: Sequence[FFN | MixtureFFN], ids: Tensor) -> list[float | None]:
    """Factor of each FFN's output where it joins the residual stream; None if it does not join as a multiple.

    Args:
        ids: tokens to measure with, (1, tokens), on the device of the input embedding.
    """
    # A vector as large as the residual stream: neither is lost in the rounding of the other.
    return [_factor(*each) for each in _movements(model, ffns, ids, 1.0)]


def residual_gains(model: Any, ffns: Sequence[FFN | MixtureFFN], ids: Tensor) -> Tensor:
    """Movement of the residual stream after each layer per unit added to the FFN output, (layers,).

    This is the factor if there is one. After a norm the movement grows more slowly than the vector: the gain is then
    that of a random vector of GAIN_STEP times the norm of the FFN output, the median over the tokens `ids`.
    """
    factors = residual_factors(model, ffns, ids)
    if None not in factors:
        return torch.tensor(factors).abs()
    small = _movements(model, ffns, ids, GAIN_STEP, of_output=True)
    gains = [
        (moved.float() - plain.float()).norm(dim=-1).median().cpu() / step.norm() if factor is None else abs(factor)
        for factor, (plain, moved, step) in zip(factors, small, strict=True)
    ]
    return torch.tensor([float(gain) for gain in gains])


def _movements(
    model: Any, ffns: Sequence[FFN | MixtureFFN], ids: Tensor, size: float, of_output: bool = False
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(layer output, layer output with a vector added to the FFN output, that vector) of each FFN.

    The second pass restores the output of each layer, so that two passes measure all layers.

    Args:
        size: scale of the random vector, relative to the rms of the layer output.
        of_output: relative to that of the FFN output.
    """
    stack = layer_stack(model)[1]
    ends = {ffn.layer: ffn.output_module for ffn in ffns}
    plain: dict[int, Tensor] = {}
    written: dict[int, Tensor] = {}
    moved: dict[int, Tensor] = {}

    def record(found: dict[int, Tensor], layer: int, module: nn.Module, args: tuple, output: Any) -> None:
        found[layer] = layer_output(output).clone()

    def restore(layer: int, module: nn.Module, args: tuple, output: Any) -> Any:
        moved[layer] = layer_output(output)
        return with_layer_output(output, plain[layer])

    with torch.no_grad():
        with ExitStack() as handles:
            for layer, end in ends.items():
                handles.callback(end.register_forward_hook(partial(record, written, layer)).remove)
                handles.callback(stack[layer].register_forward_hook(partial(record, plain, layer)).remove)
            model(input_ids=ids, use_cache=False)
        noise = torch.randn(ffns[0].hidden_size, generator=torch.Generator().manual_seed(0))
        states = written if of_output else plain
        steps = {layer: noise * (size * float(states[layer].float().pow(2).mean().sqrt())) for layer in ends}
        with ExitStack() as handles:
            for layer, end in ends.items():
                handles.callback(add_to_output(end, steps[layer]).remove)
                handles.callback(stack[layer].register_forward_hook(partial(restore, layer)).remove)
            model(input_ids=ids, use_cache=False)
    return [(plain[ffn.layer], moved[ffn.layer], steps[ffn.layer]) for ffn in ffns]


def _factor(plain: Tensor, moved: Tensor, step: Tensor) -> float | None:
    """The c of moved = plain + c step, both (..., d); None if there is none, or if the stream has several parts."""
    if plain.shape[-1] != len(step):
        return None
    change = (moved.float() - plain.float()).flatten(0, -2).cpu()
    factor = (change @ step).mean() / (step @ step)
    rest = (change - factor * step).norm(dim=1).max()
    # Not `rest > ...`: NaN must fail.
    if not rest <= _TOLERANCE.get(plain.dtype, _TOLERANCE_BFLOAT16) * factor.abs() * step.norm():
        return None
    if (factor - 1).abs() < _ONE.get(plain.dtype, _ONE_HALF):
        return 1.0
    exact = round(float(factor), 3)
    return exact if abs(exact - float(factor)) < 1e-4 else float(factor)
