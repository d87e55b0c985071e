"""The vectors of an FFN by side: what its neurons write (value) and what they read (gate and up)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from braces_cli.core.models.ffn import FFN
from braces_cli.core.models.moe import MixtureFFN
from braces_cli.core.models.value_weights import dense, stored_values
from braces_cli.core.utils.errors import ConfigError, ModelError

SIDES = ("value", "gate", "up")


def plain_ffns(found: Sequence[FFN | MixtureFFN]) -> list[FFN]:
    """The feed-forward layers of a model, each of one network.

    Raises:
        ModelError: a layer mixes experts, whose value vectors have no single weight for a token.
    """
    ffns: list[FFN] = []
    for ffn in found:
        if not isinstance(ffn, FFN):
            hint = "The summary (braces inspect alone), values, and find with words work on mixtures of experts."
            raise ModelError(f"layer {ffn.layer} is a mixture of experts, which this cannot look into", hint=hint)
        ffns.append(ffn)
    return ffns


def check_side(side: str) -> None:
    """Raises:
    ConfigError: an unknown side.
    """
    if side not in SIDES:
        raise ConfigError(f"no side `{side}`", where="--side", hint=f"There is: {', '.join(SIDES)}.")


def sides_of(ffn: FFN) -> tuple[str, ...]:
    """The sides an FFN has: all three where it is gated, else value and up."""
    return SIDES if _gated(ffn) else ("value", "up")


def side_vectors(ffn: FFN, side: str) -> Tensor:
    """(d_ff, d): row j belongs to neuron j; a view of the model's own weight.

    Raises:
        ConfigError: an unknown side, or `gate` where there is none.
    """
    check_side(side)
    if side == "value":
        return ffn.value_matrix().mT.detach()
    if not _gated(ffn):
        if side == "gate":
            hint = "It has the sides value and up."
            raise ConfigError("the FFN of this model has no gate", where="--side", hint=hint)
        return _rows(ffn.keys[0])
    first = (side == "gate") == _gate_comes_first(ffn)
    if len(ffn.keys) > 1:
        return _rows(ffn.keys[0 if first else 1])
    return _rows(ffn.keys[0]).chunk(2)[0 if first else 1]


def stacks(ffn: FFN | MixtureFFN, side: str) -> Iterator[tuple[int, Tensor]]:
    """Pairs (index of the first, vectors (n, d)) that together are the vectors of a layer.

    In a mixture of experts indices run on from expert to expert, as in `MixtureFFN.value_matrix`, and each stack is one
    expert's: a view, for all of them together would be a copy.

    Raises:
        ConfigError: an unknown side, `gate` where there is none, or another than `value` of a mixture.
    """
    if isinstance(ffn, FFN):
        yield 0, side_vectors(ffn, side)
        return
    check_side(side)
    if side != "value":
        hint = "Of experts only value vectors can be read: --side value."
        raise ConfigError(f"layer {ffn.layer} is a mixture of experts", where="--side", hint=hint)
    start = 0
    for part in ffn.parts:
        values = part.value_matrix().detach()
        for matrix in values if values.ndim == 3 else values[None]:
            yield start, matrix.mT
            start += matrix.shape[1]


def _rows(module: nn.Module) -> Tensor:
    """Weight as (outputs, inputs), unpacked where it is packed."""
    return dense(stored_values(module)).detach()


def _gated(ffn: FFN) -> bool:
    return len(ffn.keys) > 1 or len(_rows(ffn.keys[0])) == 2 * ffn.value_vectors


def _gate_comes_first(ffn: FFN) -> bool:
    """Which of the two is activated. Turning the sign of `up` turns the sign of act(gate) * up; that of `gate` does
    not, whatever the activation. Where the FFN cannot be called alone the field's usual order stands: gate first."""
    weight = _rows(ffn.keys[0])
    if weight.is_meta or not ffn.whole:
        return True
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(1, 4, weight.shape[1], generator=generator).to(weight)
    seen: list[Tensor] = []

    def turn(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        half = output.shape[-1] // 2 if len(ffn.keys) == 1 else output.shape[-1]
        return torch.cat([-output[..., :half], output[..., half:]], dim=-1)

    def keep(module: nn.Module, args: tuple) -> None:
        seen.append(args[0].float())

    handles = [ffn.value.register_forward_pre_hook(keep)]
    try:
        with torch.no_grad():
            ffn.host(h)
            handles.append(ffn.keys[0].register_forward_hook(turn))
            ffn.host(h)
    finally:
        for handle in handles:
            handle.remove()
    return not torch.allclose(seen[0], -seen[1], rtol=1e-3, atol=1e-6)
