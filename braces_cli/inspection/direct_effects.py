"""The straight way from a sub-update to a logit, found by what the modules do rather than by what they are called.

With its scale frozen at the value it has, the final norm is linear, so the logit of token t at position i is

    logit = u_i . x_i + constant,    u_i = gamma * (weight of t) / scale_i   (mean taken off where the norm centres)

and x_i is the sum of the embedding, the attention outputs and the FFN outputs: an FFN output c_l f adds c_l u_i . f.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from braces_cli.core.models.ffn import FFN, layer_stack
from braces_cli.core.utils.errors import ModelError
from braces_cli.inspection.logit_lens import Readout

# How far a module may be from the form it is taken for; half precision rounds at 4e-3.
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}


@dataclass(frozen=True)
class Direction:
    """d(logit)/dx with the scale frozen.

    Attributes:
        u: (positions, d), float32.
        constant: (positions,), what the biases of norm and head give the logit.
    """

    u: Tensor
    constant: Tensor


def direction(score: Readout, x: Tensor, tokens: list[int]) -> Direction:
    """Where the residual stream must move to raise the logit of `tokens[i]` at position i.

    Args:
        x: what enters the final norm, (positions, d).

    Raises:
        ModelError: the final norm is not of the form gamma * x / scale + beta.
    """
    kind = next((p.dtype for p in score.norm.parameters()), x.dtype)
    with torch.no_grad():
        gamma, beta, centred = _affine(score.norm, x.shape[1], x.device, kind)
        z = x.float() - x.float().mean(dim=1, keepdim=True) if centred else x.float()
        seen = score.norm(x.to(kind)).float() - beta
        flat = gamma * z
        # The scale that the norm really used, eps and all: the one factor between the two.
        inverse = (flat * seen).sum(dim=1) / (flat * flat).sum(dim=1).clamp(min=1e-30)
        wrong = (seen - flat * inverse[:, None]).abs().max() / seen.abs().max().clamp(min=1e-30)
        if wrong > _TOLERANCE.get(kind, 3e-2):
            name = type(score.norm).__name__
            hint = "Direct effects need a final LayerNorm or RMSNorm."
            raise ModelError(f"the final norm ({name}) is not linear once its scale is frozen", hint=hint)
        rows = [score.row(token) for token in tokens]
        heads, biases = torch.stack([row[0] for row in rows]), torch.tensor([row[1] for row in rows])
        if score.narrow is not None:
            heads = heads @ score.narrow.weight.detach().float()
        u = gamma * heads * inverse[:, None]
        if centred:
            u = u - u.mean(dim=1, keepdim=True)
        return Direction(u, heads @ beta + biases.to(heads))


def _affine(norm: nn.Module, width: int, device: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor, bool]:
    """gamma (d,), beta (d,) and whether the mean is taken off, from what the norm makes of three vectors."""
    probe = torch.ones(width, device=device)
    probe[1::2] = -1
    probe = probe - probe.mean()
    beta = norm(torch.zeros(1, width, device=device, dtype=dtype))[0].float()
    out = norm(probe.to(dtype)[None])[0].float()
    lifted = norm((probe + 3).to(dtype)[None])[0].float()
    rms = probe.pow(2).mean().sqrt()
    centred = bool(torch.allclose(out, lifted, rtol=2e-2, atol=1e-3 * float((out - beta).abs().max())))
    is_norm = bool(torch.allclose(norm((2 * probe).to(dtype)[None])[0].float(), out, rtol=2e-2, atol=1e-3))
    return (out - beta) / probe * (rms if is_norm else 1.0), beta, centred


def joins(model: Any, ffns: list[FFN], ids: Tensor) -> list[float]:
    """c_l of each FFN: what its output is multiplied by where it joins the residual stream (1 in most models).

    A vector is added to each FFN's output and looked for behind its layer, whose output is then put back, so one pass
    tells about all layers.

    Raises:
        ModelError: it joins in no such way (Gemma 2 norms it first).
    """
    stack = layer_stack(model)[1]
    width = ffns[0].hidden_size
    device = ids.device
    generator = torch.Generator().manual_seed(0)
    step = torch.randn(width, generator=generator).to(device)
    plain: dict[int, Tensor] = {}
    moved: dict[int, Tensor] = {}

    def keep(layer: int) -> Any:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            plain[layer] = (output[0] if isinstance(output, tuple) else output).clone()

        return hook

    def push(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return output + (step * scale[id(module)]).to(output)

    def put_back(layer: int) -> Any:
        def hook(module: nn.Module, args: tuple, output: Any) -> Any:
            moved[layer] = output[0] if isinstance(output, tuple) else output
            return (plain[layer], *output[1:]) if isinstance(output, tuple) else plain[layer]

        return hook

    with torch.no_grad():
        with ExitStack() as handles:
            for ffn in ffns:
                handles.callback(stack[ffn.layer].register_forward_hook(keep(ffn.layer)).remove)
            model(input_ids=ids, use_cache=False)
        # As large as the stream itself, so that neither drowns in the other's rounding.
        scale = {id(f.value): float(plain[f.layer].float().pow(2).mean().sqrt()) for f in ffns}
        with ExitStack() as handles:
            for ffn in ffns:
                handles.callback(ffn.value.register_forward_hook(push).remove)
                handles.callback(stack[ffn.layer].register_forward_hook(put_back(ffn.layer)).remove)
            model(input_ids=ids, use_cache=False)
    factors = []
    for ffn in ffns:
        change = (moved[ffn.layer] - plain[ffn.layer]).float().reshape(-1, width)
        expected = step * scale[id(ffn.value)]
        factor = float((change @ expected).mean() / (expected @ expected))
        error = float((change - factor * expected).abs().max() / expected.abs().max())
        if error > 3 * _TOLERANCE.get(plain[ffn.layer].dtype, 3e-2):
            hint = "Direct effects need FFN outputs that are added as they are, or times a constant."
            raise ModelError(f"layer {ffn.layer} changes its FFN's output before it joins the stream", hint=hint)
        factors.append(1.0 if abs(factor - 1) < 1e-3 else factor)
    return factors
