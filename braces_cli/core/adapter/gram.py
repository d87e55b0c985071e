"""Products with W_V W_V^T: all that training needs of a frozen value matrix.

    W_V (W_V^T x)      two passes over d x d_ff numbers, in every call and again for its gradient
    G x,  G = W_V W_V^T (d x d), computed once and cached: d_ff / d times fewer numbers, nothing to unpack or cast

G is cached in the dtype of x, and only its upper triangle, in four slabs: 2.5 d^2 bytes in float32, which is 6 MB a
layer for Qwen2.5-1.5B and 42 MB for Llama-3-8B (1.3 GB in all). At the shapes of Qwen2.5-1.5B (1,536 x 8,960, 16
columns, one CPU thread) a product takes 1.4 ms instead of 32, and G 0.5 s, so it pays off after nine to thirteen steps.
G is always computed in the first step: a rule that counts steps would make a resumed run round differently.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from braces_cli.core.models.weights import StoredValues, Values, dense

# Columns of W_V that are cast to float32 at a time. On a CPU a small block and its copy fit into the cache (three times
# faster at the shapes of Qwen2.5-1.5B); on a GPU the number of launches matters.
_BLOCK_CPU = 256
_BLOCK = 4096
# Columns at a time for G, whose products are large enough to hide cache misses.
_BLOCK_CACHED = 1024
# More slabs would store less of the lower triangle, with more launches per product.
_SLABS = 4


class _Gram(torch.autograd.Function):
    """x -> W W^T x for a frozen W (..., d, d_ff) and x (d, n), in the dtype of x.

    W W^T is symmetric, so backward is the same product, and no float32 copy of W is saved for it.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        # Detached: the algorithm of torch for (batch, d_ff, d) @ (d, n) depends on `requires_grad`, and an adapter must
        # give bit-identical results after training and after loading.
        return _gram(weight.detach(), x.detach())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        (weight,) = ctx.saved_tensors
        each = _gram(weight, grad)
        return None, each if each.ndim == 2 else each.flatten(0, -3).sum(0)


def _gram(weight: Tensor, x: Tensor) -> Tensor:
    if weight.dtype == x.dtype:
        return weight @ (weight.mT @ x)
    rows = x.mT
    total = rows.new_zeros(*weight.shape[:-2], *rows.shape[-2:])
    for block in weight.split(_BLOCK_CPU if weight.device.type == "cpu" else _BLOCK, dim=-1):
        block = block.to(x.dtype)
        total += (rows @ block) @ block.mT
    return total.mT


class _StoredGram(torch.autograd.Function):
    """x -> W W^T x for a W that is unpacked first, in forward and again in backward."""

    @staticmethod
    def forward(ctx: Any, values: StoredValues, x: Tensor) -> Tensor:
        ctx.values = values
        return _gram(values.dense(), x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, _gram(ctx.values.dense(), grad)


def gram(values: Values, x: Tensor) -> Tensor:
    """W_V W_V^T x, shape (..., d, n), for W_V (..., d, d_ff) and x (d, n); differentiable in x only.

    Memory: one block of 4,096 columns of W_V in the dtype of x, or (..., n, d_ff) numbers if the dtypes are equal; and
    one dense W_V if it is packed or offloaded.
    """
    result: Tensor = _Gram.apply(values, x) if isinstance(values, Tensor) else _StoredGram.apply(values, x)
    return result


class CachedGram:
    """W_V W_V^T of one layer, cached in training.

    Not a buffer of the module: it is never saved, and copies and pickles of it are empty.
    """

    def __init__(self) -> None:
        self._slabs: tuple[Tensor, ...] = ()
        self._key: tuple = ()
        self._weight: Tensor | None = None

    def product(self, values: Values, x: Tensor) -> Tensor:
        """`gram(values, x)` for one W_V (d, d_ff); computes G if none is cached for this W_V."""
        if not cacheable(values):
            return gram(values, x)
        weight = values.detach() if isinstance(values, Tensor) else None
        state = values.key if isinstance(values, StoredValues) else (values.data_ptr(), values._version)
        key = (weight is None, state, x.dtype, x.device)
        if self._key != key:
            self.drop()
            with torch.no_grad():
                self._slabs = _slabs(dense(values).detach(), x.dtype)
            # Keeping the weight prevents another one at its address while G is cached.
            self._key, self._weight = key, weight
        result: Tensor = _CachedProduct.apply(self._slabs, x)
        return result

    def drop(self) -> None:
        """Free the memory."""
        self._slabs, self._key, self._weight = (), (), None

    def __reduce__(self) -> tuple[type[CachedGram], tuple[()]]:
        return CachedGram, ()


def cacheable(values: Values) -> bool:
    """Return whether G is cached: one W_V, larger than G, neither offloaded nor sharded."""
    if isinstance(values, StoredValues):
        return not values.is_offloaded
    return values.ndim == 2 and values.shape[0] < values.shape[1] and not hasattr(values, "full_tensor")


def _slabs(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Rows [a, b) and columns [a, d) of W W^T (d, d), for four ranges [a, b); products in `dtype`."""
    d = len(weight)
    height = -(-d // _SLABS)
    ends = [(a, min(a + height, d)) for a in range(0, d, height)]
    if weight.dtype == dtype:
        return tuple(weight[a:b] @ weight[a:].mT for a, b in ends)
    slabs = tuple(weight.new_zeros(b - a, d - a, dtype=dtype) for a, b in ends)
    for block in weight.split(_BLOCK_CACHED if weight.device.type == "cpu" else _BLOCK, dim=1):
        block = block.to(dtype)
        for slab, (a, b) in zip(slabs, ends, strict=True):
            slab.addmm_(block[a:b], block[a:].mT)
    return slabs


class _CachedProduct(torch.autograd.Function):
    """x -> G x; backward is the same product."""

    @staticmethod
    def forward(ctx: Any, slabs: tuple[Tensor, ...], x: Tensor) -> Tensor:
        ctx.slabs = slabs
        return _times(slabs, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, _times(ctx.slabs, grad)


def _times(slabs: tuple[Tensor, ...], x: Tensor) -> Tensor:
    """G x from the slabs; the part of a slab right of its diagonal block is also used transposed."""
    rows = x.mT
    total = rows[:, : len(slabs[0])] @ slabs[0]
    a = 0
    for slab in slabs:
        b = a + len(slab)
        if a:
            total[:, a:].addmm_(rows[:, a:b], slab)
        total[:, a:b].addmm_(rows[:, b:], slab[:, b - a :].mT)
        a = b
    return total.mT
