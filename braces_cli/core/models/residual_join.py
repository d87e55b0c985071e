"""How the output of an FFN joins the residual stream, measured by adding to it.

In most models what leaves the FFN is added unchanged, in some (Granite) times a constant; in others a norm is between
(Gemma 2) or behind the sum (BERT). Only in the first two kinds does a vector added to the FFN output move the layer's
output by a multiple of that vector.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from braces_cli.core.models.ffn import FFN, layer_stack
from braces_cli.core.models.module_structure import layer_output, with_layer_output
from braces_cli.core.models.moe import MixtureFFN

# How far the movement may be from a multiple of the vector, relative to that multiple: rounding of the residual stream.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2}
_BFLOAT16 = 5e-2
# Nearer to 1 than this, a measured factor is 1.
_ONE = {torch.float64: 1e-3, torch.float32: 1e-3}
_ONE_HALF = 5e-3
# Of `residual_gains`: small enough to be near the beginning of the curve, large enough for half precision.
GAIN_STEP = 0.3


def residual_factors(model: Any, ffns: Sequence[FFN | MixtureFFN], ids: Tensor) -> list[float | None]:
    """What each FFN's output is multiplied by where it joins the residual stream; None where it joins in another way.

    Args:
        ids: tokens to measure with, (1, tokens), on the device of the input embedding.
    """
    # As large as the residual stream, so that neither is lost in the rounding of the other.
    return [_factor(*each) for each in _moved(model, ffns, ids, lambda stream, written: _size(stream))]


def residual_gains(model: Any, ffns: Sequence[FFN | MixtureFFN], ids: Tensor) -> Tensor:
    """How far the residual stream behind each layer moves for a unit that is added to what its FFN writes: (layers,).

    The factor where there is one. Behind a norm a movement grows more slowly than what is added: there it is that of a
    vector of GAIN_STEP times the norm of the FFN's output, drawn at random, the median over the tokens `ids`.
    """
    factors = residual_factors(model, ffns, ids)
    if None not in factors:
        return torch.tensor(factors).abs()
    small = _moved(model, ffns, ids, lambda stream, written: GAIN_STEP * _size(written))
    gains = [
        (moved.float() - plain.float()).norm(dim=-1).median().cpu() / step.norm() if factor is None else abs(factor)
        for factor, (plain, moved, step) in zip(factors, small, strict=True)
    ]
    return torch.tensor([float(gain) for gain in gains])


def _size(states: Tensor) -> float:
    """Root mean square of states."""
    return float(states.float().pow(2).mean().sqrt())


def _moved(
    model: Any, ffns: Sequence[FFN | MixtureFFN], ids: Tensor, size: Callable[[Tensor, Tensor], float]
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """What leaves each layer, what leaves it once a vector was added to what its FFN writes, and that vector.

    The output of the layer is put back each time, so that two passes measure all layers.

    Args:
        size: of a number of the vector, from what leaves the layer and what the FFN writes.
    """
    stack = layer_stack(model)[1]
    steps: dict[int, Tensor] = {}
    plain: dict[int, Tensor] = {}
    written: dict[int, Tensor] = {}
    moved: dict[int, Tensor] = {}

    def keep(found: dict[int, Tensor], layer: int) -> Any:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            found[layer] = layer_output(output).clone()

        return hook

    def push(layer: int) -> Any:
        def hook(module: nn.Module, args: tuple, output: Any) -> Any:
            hidden = layer_output(output)
            return with_layer_output(output, hidden + steps[layer].to(hidden))

        return hook

    def put_back(layer: int) -> Any:
        def hook(module: nn.Module, args: tuple, output: Any) -> Any:
            moved[layer] = layer_output(output)
            return with_layer_output(output, plain[layer])

        return hook

    ends = {ffn.layer: ffn.host if isinstance(ffn, MixtureFFN) else ffn.value for ffn in ffns}
    with torch.no_grad():
        with ExitStack() as handles:
            for layer, end in ends.items():
                handles.callback(end.register_forward_hook(keep(written, layer)).remove)
                handles.callback(stack[layer].register_forward_hook(keep(plain, layer)).remove)
            model(input_ids=ids, use_cache=False)
        noise = torch.randn(ffns[0].hidden_size, generator=torch.Generator().manual_seed(0))
        steps = {layer: noise * size(plain[layer], written[layer]) for layer in ends}
        with ExitStack() as handles:
            for layer, end in ends.items():
                handles.callback(end.register_forward_hook(push(layer)).remove)
                handles.callback(stack[layer].register_forward_hook(put_back(layer)).remove)
            model(input_ids=ids, use_cache=False)
    return [(plain[ffn.layer], moved[ffn.layer], steps[ffn.layer]) for ffn in ffns]


def _factor(plain: Tensor, moved: Tensor, step: Tensor) -> float | None:
    """The c of moved = plain + c step, both (..., d); None where there is no such c, or several streams in one."""
    if plain.shape[-1] != len(step):
        return None
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
