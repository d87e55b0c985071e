"""Projections with orthonormal rows, as differentiable functions of unconstrained matrices."""

from __future__ import annotations

import torch
from torch import Tensor


def orthonormal_rows(weight: Tensor) -> Tensor:
    """R = L^-1 M with L L^T = M M^T: the rows of `weight` (..., d_r, d) after Gram-Schmidt, differentiably.

    Where the rows are orthonormal already, L is the identity and R = M up to rounding.
    """
    # cholesky_ex without the error check: the check copies a flag to the host and stalls a GPU at every layer.
    factor, _ = torch.linalg.cholesky_ex(weight @ weight.mT)
    return torch.linalg.solve_triangular(factor, weight, upper=False)


def projection_error(projection: Tensor) -> float:
    """max |R R^T - I| of a projection (d_r, d), computed in float64."""
    projection = projection.detach().double().cpu()
    return float((projection @ projection.mT - torch.eye(len(projection), dtype=torch.float64)).abs().max())


def draw_projection(
    rank: int, hidden_size: int, device: torch.device | str | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """Orthonormal rows (d_r, d) of a Gaussian matrix, in float32; nothing is allocated on the device `meta`."""
    if torch.device(device or "cpu").type == "meta":
        return torch.empty(rank, hidden_size, device="meta")
    noise = torch.randn(hidden_size, rank, dtype=torch.float64, generator=generator)
    return torch.linalg.qr(noise).Q.mT.to(device, torch.float32, memory_format=torch.contiguous_format)
