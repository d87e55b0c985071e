"""Projections with orthonormal rows, as differentiable functions of unconstrained matrices.

The trained part of attribute control: h_c = p + (MLP(p) - MLP(-p)) / 2.

One MLP serves all layers: d -> 64 -> d, GELU, float32. Its last layer starts at zero, so training starts from h_c = p.

It is odd, h_c(-p) = -h_c(p), so that opposites stay opposites: strength s of one is strength -s of the other. A plain
p + MLP(p) learns besides what rows of both have in common, such as their style, as if it belonged to each: measured on
sentiment, most of what it added was that, and steering by -s then left the style, not the mood (recipes/RESULTS.md).

The factors of a relevance module, kept from one forward pass to the next while nothing they depend on changes.

The relevance module of one FFN layer in its low-rank form.

    r_ij         = c (R v_j) . (R h_i) / sqrt(d_r)                  relevance of value vector j to token i
    FFN_AUG(h_i) = sum_j (w_ij + g (r_ij + s r_cj)) v_j
                 = FFN(h_i) + B (A h_i) + s B (A h_c),    A = R,   B = g c / sqrt(d_r) W_V W_V^T R^T

The last line is the second with r substituted into the sum, so nothing of size (tokens x d_ff) is built: per layer and
step the cost is one product W_V W_V^T R^T, independent of the number of tokens, plus 4 d d_r flops per token.

Letters: d model width, d_ff neurons, d_r rank (d_r <= d), W_V (d, d_ff) value matrix with columns v_j, R (d_r, d) with
orthonormal rows, g = sigmoid(gate), c a constant of the layer (`relevance_scale`), h (..., d) the FFN's input, h_c (d)
an attribute's hidden state, s its strength.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable
from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from braces_cli.core.adapter.gram import CachedGram, gram
from braces_cli.core.distributed import full_tensor
from braces_cli.core.models.structure import by_row
from braces_cli.core.models.weights import Values


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


WIDTH = 64


class ConditionMLP(nn.Module):
    """p (..., d) -> h_c (..., d), in float32 whatever the base's dtype."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.up = nn.Linear(hidden_size, WIDTH)
        self.act = nn.GELU()
        # A bias here would cancel.
        self.down = nn.Linear(WIDTH, hidden_size, bias=False)
        nn.init.zeros_(self.down.weight)

    def forward(self, state: Tensor) -> Tensor:
        ahead, behind = self.act(self.up(torch.stack([state, -state])))
        result: Tensor = state + self.down(ahead - behind) / 2
        return result


def condition_shapes(hidden_size: int) -> dict[str, tuple[int, ...]]:
    """Tensors of the MLP in an adapter file, `condition.*`, and their shapes."""
    return {
        "condition.up.weight": (WIDTH, hidden_size),
        "condition.up.bias": (WIDTH,),
        "condition.down.weight": (hidden_size, WIDTH),
    }


class FactorCache:
    """(A, B) of each value matrix and dtype.

    One rule says when they are stale: when any parameter has another version or another device than at the time of the
    last call, or `clear` was called, all of them are computed anew.
    """

    def __init__(self) -> None:
        self._factors: dict[tuple[Hashable, torch.dtype], tuple[Tensor, Tensor]] = {}
        self._state: tuple | None = None

    def factors(
        self,
        parameters: Iterable[Tensor],
        values: Values,
        dtype: torch.dtype,
        compute: Callable[[], tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor]:
        """What is kept for `values` in `dtype`, or `compute()`, kept from now on."""
        state = tuple((parameter._version, parameter.device) for parameter in parameters)
        if self._state != state:
            self._factors, self._state = {}, state
        key = (values.data_ptr() if isinstance(values, Tensor) else values.key, dtype)
        if key not in self._factors:
            self._factors[key] = compute()
        return self._factors[key]

    def clear(self) -> None:
        """Forget everything: for changes that no version counter shows."""
        self._state = None


# Before the sigmoid: g = 0.0067, so training starts close to the base.
GATE_INIT = -5.0

# How a parameter is read: as it is, or whole where it lies in pieces on several processes.
Read = Callable[[Tensor], Tensor]


def as_is(parameter: Tensor) -> Tensor:
    """The parameter itself."""
    return parameter


class RelevanceModule(nn.Module):
    """Projection and gate of one FFN layer, and what they add to its output.

    Parameters (float32, whatever the base's dtype): `weight` (d_r, d), unconstrained, of which the projection R is the
    orthonormalised form; `gate` (1,) before the sigmoid, because FSDP2 takes no scalar parameter. `scale` is c, which
    is not trained.

    Args:
        rank: d_r.
        hidden_size: d.
        device: where the base's value matrix lives; "meta" allocates nothing.
        generator: draws the first projection, orthonormal rows of a Gaussian matrix.
        scale: c.
    """

    def __init__(
        self,
        rank: int,
        hidden_size: int,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.rank = rank
        self.scale = scale
        self.enabled = True
        self.weight = nn.Parameter(draw_projection(rank, hidden_size, device, generator))
        self.gate = nn.Parameter(torch.full((1,), GATE_INIT, device=device))
        # What steering adds to R h, in rank space: (d_r,) for all tokens, (batch, 1, d_r) or (batch, tokens, d_r).
        self.shift: Tensor | None = None
        # Version of `weight` that is known to be orthonormal already, so that R is `weight` itself, bit for bit.
        self._exact: int | None = None
        self._cache = FactorCache()
        # W_V W_V^T while this learns, where `cache_gram` asked for it.
        self._cached_gram: CachedGram | None = None
        self._register()

    def extra_repr(self) -> str:
        return f"rank={self.rank}, hidden_size={self.weight.shape[1]}, scale={self.scale:g}"

    @property
    def g(self) -> Tensor:
        """sigmoid(gate), shape (1,)."""
        return self.gate.sigmoid()

    def set_scale(self, scale: float) -> None:
        """Set c, the constant factor of every relevance score."""
        self.scale = scale
        self._cache.clear()

    def cache_gram(self, keep: bool) -> None:
        """Whether W_V W_V^T is kept while this learns (`core.adapter.gram`); False also frees it. One W_V only."""
        self._cached_gram = CachedGram() if keep else None

    def release(self) -> None:
        """Free what is kept between passes; it is made anew where it is needed again, with the same bits."""
        if self._cached_gram is not None:
            self._cached_gram.drop()

    def projection(self, read: Read = as_is) -> Tensor:
        """R (d_r, d), the factor A, differentiable in `weight`.

        Args:
            read: gives a parameter whole, where it may lie in pieces.
        """
        # In this order: a compiler can follow what learns, not a version counter.
        exact = not self._learns() and self._exact == self.weight._version
        matrix = read(self.weight)
        if exact:
            return matrix
        with torch.autocast(matrix.device.type, enabled=False):
            return orthonormal_rows(matrix)

    def materialise(self) -> Tensor:
        """Make `weight` the projection, rounded once from float64, and return it: what a file holds.

        From here on, until the next optimizer step, R is `weight` bit for bit, before saving and after loading alike.
        """
        with torch.no_grad():
            if self._exact != self.weight._version:
                self.weight.copy_(self.rounded())
                self.set_exact()
        return self.weight.detach()

    def rounded(self) -> Tensor:
        """What `materialise` would return, while `weight` stays as it is: training goes on from there.

        Where it is spread over processes, each of them must ask.
        """
        version = self.weight._version
        matrix: Tensor = full_tensor(self.weight.detach())
        return matrix if self._exact == version else orthonormal_rows(matrix.double()).to(matrix.dtype)

    def set_exact(self) -> None:
        """Declare that `weight` has orthonormal rows, as loaded from a checked file."""
        self._exact = self.weight._version
        self._cache.clear()

    def relevance_scores(self, h: Tensor, values: Tensor) -> Tensor:
        """r_ij of every value vector j to every token i, (..., d_ff) in float32, without steering.

        Materialises the full matrix; for inspection only. g r_ij is added to the weights w_ij.
        """
        projection = self.projection().to(h.device, torch.float32)
        factor = self.scale / math.sqrt(self.rank)
        return ((h.float() @ projection.mT) * factor) @ (projection @ values.to(h.device).float())

    def factors(self, values: Values, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A (d_r, d) and B (..., d, d_r) in `dtype`, for the value matrix or matrices `values` (..., d, d_ff).

        With gradients on they are computed anew, once a forward pass; otherwise once, until a parameter changes. Only
        the former goes by way of `cache_gram`: what is saved must not depend on how it was trained.
        """
        if self._learns():
            seen = isinstance(values, Tensor)
            return self._learning(values, dtype) if seen else self._learning_unseen(values, dtype)
        if not torch.compiler.is_compiling():
            return self._cached(values, dtype)
        if isinstance(values, Tensor):
            down, up = _cached_factors([*self.parameters(recurse=False)], values, self._handle, dtype)
            return down, up
        return self._cached_unseen(values, dtype)

    def _cached(self, values: Values, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        parameters = self.parameters(recurse=False)
        return self._cache.factors(parameters, values, dtype, lambda: self._compute(values, dtype))

    # No compiler follows the unpacking of every packing: torch.compile breaks its graph around these two.
    @torch.compiler.disable
    def _cached_unseen(self, values: Values, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return self._cached(values, dtype)

    @torch.compiler.disable
    def _learning_unseen(self, values: Values, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return self._learning(values, dtype)

    def _learning(self, values: Values, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        # No compiler follows what is kept between passes; it may as well fuse the two products.
        if self._cached_gram is None or torch.compiler.is_compiling():
            return self._compute(values, dtype)
        return self._compute(values, dtype, self._cached_gram.product)

    def _compute(
        self, values: Values, dtype: torch.dtype, product: Callable[[Values, Tensor], Tensor] = gram
    ) -> tuple[Tensor, Tensor]:
        projection = self.projection()
        with torch.autocast(self.weight.device.type, enabled=False):
            out = product(values, projection.mT) * (self.g * self.scale / math.sqrt(self.rank))
        return projection.to(dtype), out.to(dtype)

    def _learns(self) -> bool:
        return torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters(recurse=False))

    def forward(self, output: Tensor, h: Tensor, values: Values) -> Tensor:
        """FFN output (..., d) plus what the adapter adds, for the FFN's input `h` (..., d) and W_V (d, d_ff)."""
        down, up = self.factors(values, output.dtype)
        # Under a device map the two ends of a pair can lie on two devices.
        ranked = self._ranked(h.to(output), down).reshape(-1, self.rank)
        # One fused multiply-add over flat tokens instead of a product and a sum.
        return torch.addmm(output.reshape(-1, output.shape[-1]), ranked, up.mT).view(output.shape)

    def routed(self, output: Tensor, h: Tensor, p: Tensor, values: Tensor) -> Tensor:
        """Output (n, d) of routed experts plus sum_e p_e B_e (A h + shift).

        Args:
            h: tokens (n, d).
            p: what each expert's output is multiplied by, (n, experts), 0 where a token is not sent.
            values: W_V of each expert, (experts, d, d_ff).

        Memory: n * experts * d_r numbers, and experts * d * d_r for B; nothing of d_ff a token.
        """
        down, up = self.factors(values, output.dtype)
        ranked = self._ranked(h.to(output.dtype), down).reshape(-1, self.rank)
        spread = (p.to(output.dtype).unsqueeze(2) * ranked.unsqueeze(1)).flatten(1)
        flat = torch.addmm(output.reshape(-1, output.shape[-1]), spread, up.mT.reshape(-1, up.shape[1]))
        return flat.view(output.shape)

    def by_expert(self, output: Tensor, h: Tensor, values: Tensor) -> Tensor:
        """Output (experts * n, d) of experts that each see their own tokens `h`, plus B_e (A h + shift) of each.

        A row of zeros is a token that the expert was not sent: nothing is added for it, no steering either.
        """
        down, up = self.factors(values, output.dtype)
        h = h.to(output.dtype)
        flat = h.reshape(len(values), -1, h.shape[-1])
        ranked = F.linear(flat, down)
        if self.shift is not None:
            shift = self.shift.to(output)
            if shift.ndim == 3:
                shift = shift.expand(-1, flat.shape[1] // len(shift), -1).reshape(flat.shape[1], self.rank)
            ranked = ranked + shift * (flat != 0).any(dim=-1, keepdim=True)
        return output + (ranked @ up.mT).reshape(output.shape)

    def _ranked(self, h: Tensor, down: Tensor) -> Tensor:
        """A h + shift, (..., d_r)."""
        if self.shift is None:
            return F.linear(h, down)
        if self.shift.ndim == 1:
            # A shift that all tokens share is the bias of the product, and so costs nothing.
            return F.linear(h, down, self.shift.to(h))
        return by_row(F.linear(h, down), len(self.shift)) + self.shift.to(h)

    def _register(self) -> None:
        self._handle = next(_handles)
        _modules[self._handle] = self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._register()  # a copy is another module

    def train(self, mode: bool = True) -> RelevanceModule:
        # An optimizer that writes through `.data` leaves version counters alone; changing mode is when that can matter.
        self._cache.clear()
        if not mode:
            self.release()
        return super().train(mode)

    def _apply(self, fn: Callable, recurse: bool = True) -> RelevanceModule:
        # `model.to(torch.bfloat16)` must not round the projection: move it, keep its dtype.
        def keep_precision(tensor: Tensor) -> Tensor:
            moved: Tensor = fn(tensor)
            return tensor.to(moved.device) if moved.dtype.itemsize < tensor.dtype.itemsize else moved

        exact = self._exact == self.weight._version
        super()._apply(keep_precision, recurse)
        self._cache.clear()
        self.release()
        self._exact = self.weight._version if exact else None
        return self


# Where a compiled graph finds the module whose factors it asks for: an operator takes tensors and plain numbers only.
_handles = count()
_modules: WeakValueDictionary[int, RelevanceModule] = WeakValueDictionary()


@torch.library.custom_op("braces::cached_factors", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _cached_factors(parameters: list[Tensor], values: Tensor, handle: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`RelevanceModule._cached` as one step of a compiled graph, so that version counters are read when it runs.

    Copies, because a compiler may reuse the memory of what an operator returns. Not for CUDA graphs, which would replay
    the factors of the first run for ever.
    """
    with torch.no_grad():
        down, up = _modules[handle]._cached(values, dtype)
    return down.clone(memory_format=torch.contiguous_format), up.clone(memory_format=torch.contiguous_format)


@_cached_factors.register_fake
def _(parameters: list[Tensor], values: Tensor, handle: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    rank, width = parameters[0].shape
    down = parameters[0].new_empty(rank, width, dtype=dtype)
    return down, parameters[0].new_empty(*values.shape[:-2], width, rank, dtype=dtype)
