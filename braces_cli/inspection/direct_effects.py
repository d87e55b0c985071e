"""The straight way from a sub-update to a logit, found by what the modules do rather than by what they are called.

With its scale frozen at the value it has, the final norm is linear, so the logit of token t at position i is

    logit = u_i . x_i + constant,    u_i = gamma * (weight of t) / scale_i   (mean taken off where the norm centres)

and x_i is the sum of the embedding, the attention outputs and the FFN outputs: an FFN output c_l f adds c_l u_i . f.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from braces_cli.core.models.ffn import FFN
from braces_cli.core.models.residual_join import residual_factors
from braces_cli.core.utils.errors import ModelError
from braces_cli.inspection.logit_lens import LogitLens

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


def direction(lens: LogitLens, x: Tensor, tokens: list[int]) -> Direction:
    """Where the residual stream must move to raise the logit of `tokens[i]` at position i.

    Args:
        x: what enters the final norm, (positions, d).

    Raises:
        ModelError: the final norm is not of the form gamma * x / scale + beta.
    """
    kind = next((p.dtype for p in lens.norm.parameters()), x.dtype)
    with torch.no_grad():
        gamma, beta, centred = _affine(lens.norm, x.shape[1], x.device, kind)
        z = x.float() - x.float().mean(dim=1, keepdim=True) if centred else x.float()
        normed = lens.norm(x.to(kind)).float().to(x.device) - beta
        flat = gamma * z
        # The scale that the norm really used, eps and all: the one factor between the two.
        inverse = (flat * normed).sum(dim=1) / (flat * flat).sum(dim=1).clamp(min=1e-30)
        wrong = (normed - flat * inverse[:, None]).abs().max() / normed.abs().max().clamp(min=1e-30)
        if wrong > _TOLERANCE.get(kind, 3e-2):
            name = type(lens.norm).__name__
            hint = "Direct effects need a final LayerNorm or RMSNorm."
            raise ModelError(f"the final norm ({name}) is not linear once its scale is frozen", hint=hint)
        rows = {token: lens.row(token) for token in set(tokens)}
        heads = torch.stack([rows[token][0] for token in tokens]).to(x.device)
        biases = torch.tensor([rows[token][1] for token in tokens], device=x.device)
        if lens.narrow is not None:
            heads = heads @ lens.narrow.weight.detach().float().to(x.device)
        u = gamma * heads * inverse[:, None]
        if centred:
            u = u - u.mean(dim=1, keepdim=True)
        return Direction(u, heads @ beta + biases)


def _affine(norm: nn.Module, width: int, device: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor, bool]:
    """gamma (d,), beta (d,) and whether the mean is taken off, from what the norm makes of four vectors."""

    def normed(x: Tensor) -> Tensor:
        y: Tensor = norm(x.to(dtype)[None])[0]
        return y.float().to(device)

    probe = torch.ones(width, device=device)
    probe[1::2] = -1
    probe = probe - probe.mean()
    beta, out, lifted = normed(torch.zeros_like(probe)), normed(probe), normed(probe + 3)
    rms = probe.pow(2).mean().sqrt()
    centred = bool(torch.allclose(out, lifted, rtol=2e-2, atol=1e-3 * float((out - beta).abs().max())))
    is_norm = bool(torch.allclose(normed(2 * probe), out, rtol=2e-2, atol=1e-3))
    return (out - beta) / probe * (rms if is_norm else 1.0), beta, centred


def direct_factors(model: Any, ffns: list[FFN], ids: Tensor) -> list[float]:
    """c_l of each FFN: what its output is multiplied by where it joins the residual stream (1 in most models).

    Raises:
        ModelError: it joins in another way (Gemma 2 normalises it first).
    """
    factors: list[float] = []
    for ffn, factor in zip(ffns, residual_factors(model, ffns, ids), strict=True):
        if factor is None:
            hint = "Direct effects need FFN outputs that are added unchanged, or times a constant."
            raise ModelError(f"layer {ffn.layer} changes its FFN's output before it joins the stream", hint=hint)
        factors.append(factor)
    return factors
