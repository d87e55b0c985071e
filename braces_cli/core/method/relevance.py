"""The relevance module of one FFN layer in its low-rank form.

    r_ij         = (R_k v_j)^T diag(c) (R_q h_i)                     relevance of value vector j to token i
    FFN_AUG(h_i) = sum_j (w_ij + r_ij + s r_cj) v_j
                 = FFN(h_i) + B (A h_i) + s B (A h_c),    A = R_q,   B = W_V W_V^T R_k^T diag(c)

The last line is the one before with r put into the sum, so nothing of size (tokens x d_ff) is ever built: per layer and
step the cost is one product W_V W_V^T R_k^T, independent of the number of tokens, plus 4 d d_r flops a token.

Three of the forms of `relevance_forms` differ in R_q, R_k and c alone. `paper` (section 3.1) and `signed` have one
projection R for both; c is a g / sqrt(d_r) in every direction for `paper`, with g = sigmoid(gate), and a gate, free and
signed, for the others. a is a number of the layer that is never trained: 1 for `paper`, d / |W_V|^2 for `signed` and
`untied`, the inverse of the mean eigenvalue of W_V W_V^T. With it a coefficient means the same on every base: W_V times
a number and the up projection divided by it leave the base and, trained, the adapter's function as they are.

`whitened` measures relevance between whitened value vectors, r_ij = (R_k G^-1 v_j)^T diag(c) (R_q h_i), G = W_V W_V^T.
In `untied` an update of the output is stretched by G, mostly along a few directions; here G cancels out of it, so that

    B = R_k^T diag(c)

costs nothing to make, and r_ij are, of all changes of the weights with this effect, those of least norm. The value
vectors must span the width: d_ff >= d. a is 1, for B knows no units of W_V.

Letters: d model width, d_ff neurons, d_r rank (d_r <= d), W_V (d, d_ff) value matrix with columns v_j, R (d_r, d) with
orthonormal rows, h (..., d) what enters the FFN, h_c (d) an attribute's hidden state, s its strength.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from braces_cli.core.method.factor_cache import FactorCache
from braces_cli.core.method.projections import draw_projection, orthonormal_rows
from braces_cli.core.method.relevance_forms import QUERY_FORMS, gate_values
from braces_cli.core.method.value_gram import KeptGram, gram, least_norm_weights
from braces_cli.core.models.module_structure import by_row
from braces_cli.core.models.value_weights import Values
from braces_cli.core.utils.distributed import whole

# Of `paper`, before the sigmoid: g = 0.0067, so training starts close to the base.
GATE_INIT = -5.0
# Of the other forms: the coefficient that every direction starts with.
COEFFICIENT_INIT = 0.0


# How a parameter is read: as it is, or whole where it lies in pieces on several processes.
Read = Callable[[Tensor], Tensor]


def as_is(parameter: Tensor) -> Tensor:
    """The parameter itself."""
    return parameter


class RelevanceModule(nn.Module):
    """Projections and coefficients of one FFN layer, and what they add to its output.

    Parameters (float32, whatever the base's dtype): `weight` (d_r, d), unconstrained, of which the projection R (R_k
    where R_q is another) is the orthonormalised form; `query` (d_r, d), the same for R_q, or None where it is R;
    `gate`, (1,) before the sigmoid for `paper` (FSDP2 takes no scalar parameter), else (d_r,). `scale` is a, see
    `set_scale`.

    Args:
        rank: d_r.
        hidden_size: d.
        device: where the base's value matrix lives; "meta" allocates nothing.
        generator: draws the first projection, orthonormal rows of a Gaussian matrix.
        form: one of `relevance_forms.FORMS`.
    """

    def __init__(
        self,
        rank: int,
        hidden_size: int,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
        form: str = "paper",
    ) -> None:
        super().__init__()
        self.rank = rank
        self.form = form
        self.scale = 1.0
        self.enabled = True
        start = draw_projection(rank, hidden_size, device, generator)
        self.weight = nn.Parameter(start)
        self.query = nn.Parameter(start.clone()) if form in QUERY_FORMS else None
        size, first = (1, GATE_INIT) if form == "paper" else (rank, COEFFICIENT_INIT)
        self.gate = nn.Parameter(torch.full((size,), first, device=device))
        # What steering adds to R_q h, in rank space: (d_r,) for all tokens, (batch, 1, d_r) or (batch, tokens, d_r).
        self.shift: Tensor | None = None
        # Versions of the unconstrained matrices that are known to be orthonormal already, so that R is the matrix
        # itself, bit for bit.
        self._exact: dict[str, int] = {}
        self._cache = FactorCache()
        # W_V W_V^T while this learns, where `keep_gram` asked for it.
        self._kept: KeptGram | None = None
        self._register()

    def extra_repr(self) -> str:
        return f"form={self.form}, rank={self.rank}, hidden_size={self.weight.shape[1]}"

    @property
    def g(self) -> Tensor:
        """What the gate lets through: sigmoid(gate), shape (1,), for `paper`; else the coefficients, (d_r,)."""
        return gate_values(self.form, self.gate)

    @property
    def coefficients(self) -> Tensor:
        """c, what each direction is weighted with: (1,) for `paper`, where all have the same, else (d_r,)."""
        scaled = self.g * self.scale
        return scaled / math.sqrt(self.rank) if self.form == "paper" else scaled

    @property
    def gain(self) -> Tensor:
        """What `relevance_scores` are multiplied by when they are added to the weights: g a for `paper`, else 1."""
        return self.g * self.scale if self.form == "paper" else torch.ones_like(self.gate[:1])

    def _ungated(self) -> Tensor:
        """What `gain` times it is `coefficients`, also of a gate so far shut that g is 0."""
        return torch.full_like(self.gate, self.rank**-0.5) if self.form == "paper" else self.coefficients

    def set_scale(self, scale: float) -> None:
        """Set a, the fixed factor of every relevance score."""
        self.scale = scale
        self._cache.clear()

    def keep_gram(self, keep: bool) -> None:
        """Whether W_V W_V^T is kept while this learns (`core.method.value_gram`); False also frees it. One W_V only."""
        self._kept = KeptGram() if keep and self.form != "whitened" else None

    def release(self) -> None:
        """Free what is kept between passes; it is made anew where it is needed again, with the same bits."""
        if self._kept is not None:
            self._kept.drop()

    def matrices(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Name in an adapter file and parameter of each unconstrained matrix."""
        yield "projection", self.weight
        if self.query is not None:
            yield "query_projection", self.query

    def projection(self) -> Tensor:
        """R, or R_k where R_q is another, (d_r, d), differentiable in `weight`."""
        return self._orthonormal("projection", self.weight)

    def query_projection(self, read: Read = as_is) -> Tensor:
        """R_q (d_r, d), the factor A; the same as `projection()` where there is one for both.

        Args:
            read: gives a parameter whole, where it may lie in pieces.
        """
        name, matrix = ("projection", self.weight) if self.query is None else ("query_projection", self.query)
        return self._orthonormal(name, matrix, read)

    def _orthonormal(self, name: str, matrix: Tensor, read: Read = as_is) -> Tensor:
        # In this order: a compiler can follow what learns, not a version counter.
        exact = not self._learns() and self._exact.get(name) == matrix._version
        matrix = read(matrix)
        if exact:
            return matrix
        with torch.autocast(matrix.device.type, enabled=False):
            return orthonormal_rows(matrix)

    def materialise(self) -> dict[str, Tensor]:
        """Make each matrix its projection, rounded once from float64, and return them: what a file holds.

        From here on, until the next optimizer step, R is the matrix bit for bit, before saving and after loading alike.
        """
        with torch.no_grad():
            if not self._all_exact():
                for (_, matrix), rounded in zip(self.matrices(), self.rounded().values(), strict=True):
                    matrix.copy_(rounded)
                self.set_exact()
        return {name: matrix.detach() for name, matrix in self.matrices()}

    def rounded(self) -> dict[str, Tensor]:
        """What `materialise` would return, while the matrices stay as they are: training goes on from there.

        Where they are spread over processes, each of them must ask.
        """
        return {
            name: matrix if self._exact.get(name) == version else orthonormal_rows(matrix.double()).to(matrix.dtype)
            for name, matrix, version in ((n, whole(m.detach()), m._version) for n, m in self.matrices())
        }

    def set_exact(self) -> None:
        """Declare that the matrices have orthonormal rows, as loaded from a checked file."""
        self._exact = {name: matrix._version for name, matrix in self.matrices()}
        self._cache.clear()

    def _all_exact(self) -> bool:
        return all(self._exact.get(name) == matrix._version for name, matrix in self.matrices())

    def relevance_scores(self, h: Tensor, values: Tensor) -> Tensor:
        """r_ij of every value vector j to every token i, (..., d_ff) in float32, without steering.

        Large on purpose, for looking inside. `gain` times it is what is added to the weights w_ij.
        """
        keys, queries, weights = (
            tensor.to(h.device, torch.float32)
            for tensor in (self.projection(), self.query_projection(), self._ungated())
        )
        values = values.to(h.device)
        whitened = self.form == "whitened"
        matched = least_norm_weights(values, keys.mT).mT.float() if whitened else keys @ values.float()
        return ((h.float() @ queries.mT) * weights) @ matched

    def factors(self, values: Values, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A (d_r, d) and B (..., d, d_r) in `dtype`, for the value matrix or matrices `values` (..., d, d_ff).

        With gradients on they are computed anew, once a forward pass; otherwise once, until a parameter changes. Only
        the former goes by way of `keep_gram`: what is saved must not depend on how it was trained.
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
        if self._kept is None or torch.compiler.is_compiling():
            return self._compute(values, dtype)
        return self._compute(values, dtype, self._kept.product)

    def _compute(
        self, values: Values, dtype: torch.dtype, product: Callable[[Values, Tensor], Tensor] = gram
    ) -> tuple[Tensor, Tensor]:
        keys = self.projection()
        queries = keys if self.query is None else self.query_projection()
        with torch.autocast(self.weight.device.type, enabled=False):
            if self.form == "whitened":
                out = keys.mT * self.coefficients
                # The same for every expert: a view.
                out = out.expand(*values.shape[:-2], *out.shape) if isinstance(values, Tensor) else out
            else:
                out = product(values, keys.mT) * self.coefficients
        return queries.to(dtype), out.to(dtype)

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

        exact = {name for name, matrix in self.matrices() if self._exact.get(name) == matrix._version}
        super()._apply(keep_precision, recurse)
        self._cache.clear()
        self.release()
        self._exact = {name: matrix._version for name, matrix in self.matrices() if name in exact}
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
