"""The paper's formula written out: the judge of every fast path. Slow and large on purpose; only tests call it.

    r_i          = (R W_V)^T (R h_i) / sqrt(d_r) + s r_c
    FFN_AUG(h_i) = sum_j (w_ij + g r_ij) v_j

It shares no arithmetic with `relevance.py`: rows are orthonormalised one by one, relevance is a (tokens, d_ff) tensor,
and the weights it changes are those that enter the model's own value projection.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from braces_cli.core.adapter import Adapter


def orthonormal_rows_ref(weight: Tensor) -> Tensor:
    """Gram-Schmidt, one row at a time: (d_r, d) -> (d_r, d)."""
    rows: list[Tensor] = []
    for row in weight:
        for _ in range(2):  # twice is enough for full orthogonality in floating point
            for done in rows:
                row = row - (row @ done) * done
        rows.append(row / row.norm())
    return torch.stack(rows)


def relevance_ref(h: Tensor, values: Tensor, projection: Tensor) -> Tensor:
    """Relevance of every value vector to every token, (..., d_ff).

    h (..., d), values (d, d_ff), projection (d_r, d).
    """
    return (h @ projection.mT) @ (projection @ values) / math.sqrt(len(projection))


def weights_ref(
    w: Tensor, h: Tensor, values: Tensor, weight: Tensor, gate: Tensor, conditions: Sequence[tuple[Tensor, Tensor]] = ()
) -> Tensor:
    """Sub-update weights w_ij + g r_ij, shape (..., d_ff).

    Args:
        w: activation weights (..., d_ff), what enters the value projection.
        h: FFN input (..., d).
        values: W_V (d, d_ff).
        weight: unconstrained projection (d_r, d).
        gate: (1,), before the sigmoid.
        conditions: pairs of h_c (d) and strength s, a scalar or (batch, 1, 1).
    """
    wide = weight.dtype
    projection = orthonormal_rows_ref(weight)
    r = relevance_ref(h.to(wide), values.to(wide), projection)
    for state, strength in conditions:
        r = r + strength * relevance_ref(state.to(wide), values.to(wide), projection)
    return w + (torch.sigmoid(gate) * r).to(w.dtype)


@contextmanager
def reference(
    adapter: Adapter, conditions: dict[int, Sequence[tuple[Tensor, Tensor]]] | None = None
) -> Iterator[nn.Module]:
    """The adapter's model with the formula written out instead of the fast path; restores the fast path on leaving.

    Args:
        conditions: for each layer, pairs of h_c (d) and strength.
    """
    handles = []
    inputs: dict[int, Tensor] = {}

    def keep(index: int) -> Any:
        def hook(module: nn.Module, args: tuple) -> None:
            inputs[index] = args[0]

        return hook

    def augment(index: int) -> Any:
        ffn, brace = adapter.sites[index]
        terms = (conditions or {}).get(ffn.layer, ())

        def hook(module: nn.Module, args: tuple) -> tuple:
            w = weights_ref(args[0], inputs[index], ffn.value_matrix(), brace.weight, brace.gate, terms)
            return (w, *args[1:])

        return hook

    try:
        for index, (ffn, _) in enumerate(adapter.sites):
            handles.append(ffn.keys[0].register_forward_pre_hook(keep(index)))
            handles.append(ffn.value.register_forward_pre_hook(augment(index)))
        with adapter.disabled():
            yield adapter.model
    finally:
        for handle in handles:
            handle.remove()
