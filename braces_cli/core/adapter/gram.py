"""Products with W_V W_V^T, the only thing that training needs a frozen value matrix for.

    W_V (W_V^T x)      two passes over d x d_ff numbers, at every call and again for its gradient
    G x,  G = W_V W_V^T (d x d), made once and kept: d_ff / d times fewer numbers, nothing to unpack or cast

G is kept in the dtype of x, and of the symmetric matrix only what is on and above the diagonal, in four slabs: 2.5 d^2
bytes in float32, which is 6 MB a layer for Qwen2.5-1.5B and 42 MB for Llama-3-8B (1.3 GB in all). At the former's
shapes (1,536 x 8,960, 16 columns, one thread of a CPU) a product takes 1.4 ms instead of 32, and making G 0.5 s, so it
is paid for after nine to thirteen steps. Always made at the first of them: a rule that counts would count anew in a
resumed run, which would then round otherwise.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from braces_cli.core.models.weights import StoredValues, Values, dense

# Columns of W_V that are cast to float32 at a time. On a CPU a block and its copy stay in the cache (three times faster
# than large blocks at Qwen2.5-1.5B shapes); elsewhere few launches count.
_BLOCK_CPU = 256
_BLOCK = 4096
# The same where G is made, whose products are large enough to hide a cache miss.
_BLOCK_CACHED = 1024
# More of them would come nearer to half of G, but are more launches a product.
_SLABS = 4


class _Gram(torch.autograd.Function):
    """x -> W W^T x for a frozen W (..., d, d_ff) and x (d, n), in the dtype of x.

    W W^T is symmetric, so backward is the same product and only W itself is kept, never a float32 copy of it.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        # Detached: how torch multiplies (batch, d_ff, d) by (d, n) depends on whether either asks for gradients, and
        # an adapter just trained must give the bits of the same one loaded.
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
    """The same where W must be unpacked first: once in each direction, and nothing dense is kept in between."""

    @staticmethod
    def forward(ctx: Any, values: StoredValues, x: Tensor) -> Tensor:
        ctx.values = values
        return _gram(values.dense(), x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, _gram(ctx.values.dense(), grad)


def gram(values: Values, x: Tensor) -> Tensor:
    """W_V W_V^T x, shape (..., d, n), for W_V (..., d, d_ff) and x (d, n); differentiable in x only.

    Memory: one block of 4,096 columns of W_V in the dtype of x, and (..., n, d_ff) numbers where the dtypes agree; and
    one dense W_V where it is packed or offloaded.
    """
    result: Tensor = _Gram.apply(values, x) if isinstance(values, Tensor) else _StoredGram.apply(values, x)
    return result


class CachedGram:
    """W_V W_V^T of one layer, for as long as its adapter learns.

    No tensor of the module's: it is never saved, and a copy or a pickle of it is empty.
    """

    def __init__(self) -> None:
        self._slabs: tuple[Tensor, ...] = ()
        self._cache_key: tuple = ()

    def product(self, values: Values, x: Tensor) -> Tensor:
        """`gram(values, x)` for one W_V (d, d_ff); G is made where there is none yet, or one of another W_V."""
        if not cacheable(values):
            return gram(values, x)
        if not self._fits(values, x):
            self.drop()
            with torch.no_grad():
                self._slabs = _slabs(dense(values).detach(), x.dtype)
            self._cache_key = (*_state(values), x.dtype, x.device)
        result: Tensor = _CachedProduct.apply(self._slabs, x)
        return result

    def drop(self) -> None:
        """Free the memory."""
        self._slabs, self._cache_key = (), ()

    @property
    def nbytes(self) -> int:
        """What is kept now, in bytes."""
        return sum(slab.nbytes for slab in self._slabs)

    def _fits(self, values: Values, x: Tensor) -> bool:
        if not self._cache_key:
            return False
        *state, dtype, device = self._cache_key
        return (dtype, device) == (x.dtype, x.device) and _same(state, _state(values))

    def __reduce__(self) -> tuple[type[CachedGram], tuple[()]]:
        return CachedGram, ()


def cacheable(values: Values) -> bool:
    """Whether G is worth its memory: smaller than W_V, of which there is one, and which is not kept elsewhere to save
    memory (accelerate's offloading) or spread over devices."""
    if isinstance(values, StoredValues):
        return not values.is_offloaded
    return values.ndim == 2 and values.shape[0] < values.shape[1] and not hasattr(values, "full_tensor")


def _state(values: Values) -> tuple[Any, ...]:
    """What tells one W_V, and one content of it, from another.

    The tensor itself is among it, so that while G is kept its memory cannot become that of another one.
    """
    if isinstance(values, StoredValues):
        return None, values.key, 0
    return values.detach(), values.data_ptr(), values._version


def _same(cache_key: list[Any], state: tuple[Any, ...]) -> bool:
    return (cache_key[0] is None) == (state[0] is None) and cache_key[1:] == list(state[1:])


def _slabs(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Rows [a, b) and columns [a, d) of W W^T (d, d), for the four [a, b) that make up d; products in `dtype`."""
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
    """x -> G x, of which backward is the same product."""

    @staticmethod
    def forward(ctx: Any, slabs: tuple[Tensor, ...], x: Tensor) -> Tensor:
        ctx.slabs = slabs
        return _times(slabs, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, _times(ctx.slabs, grad)


def _times(slabs: tuple[Tensor, ...], x: Tensor) -> Tensor:
    """G x from the slabs: each is multiplied by from the left, and what is right of its square also from the right."""
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
