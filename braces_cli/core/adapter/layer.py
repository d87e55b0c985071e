"""The relevance module of one FFN in its low-rank form, and the MLP of attribute control.

    r_ij         = c (R v_j) . (R h_i) / sqrt(d_r)                  relevance of value vector j to token i
    FFN_AUG(h_i) = sum_j (w_ij + g (r_ij + s r_cj)) v_j
                 = FFN(h_i) + B (A h_i) + s B (A h_c),    A = R,   B = g c / sqrt(d_r) W_V W_V^T R^T

Relevance to the output is an extension of the paper's formula. y = FFN(h), its bias included, is in the place of h,
value vectors and y have a projection each, and a signed diagonal D is in the place of the gate:

    r_ij         = c (R_k v_j)^T D (R_q y_i) / sqrt(d_r)
    FFN_AUG(h_i) = sum_j (w_ij + r_ij + s r_cj) v_j,   A = R_q,   B = c / sqrt(d_r) W_V W_V^T R_k^T D

This is a low-rank edit of the value vectors, (I + B A) W_V.

FFN(h_i) + B (A h_i) is the formula with r substituted, so nothing of size (tokens x d_ff) is computed: the cost is
one product W_V W_V^T R^T per layer and step, independent of the number of tokens, plus 4 d d_r flops per token.

Letters: d model width, d_ff neurons, d_r rank (d_r <= d), W_V (d, d_ff) value matrix with columns v_j, R (d_r, d) with
orthonormal rows, g = sigmoid(gate), c a constant of the layer (`relevance_scale`), h (..., d) the FFN's input, h_c (d)
an attribute's hidden state, s its strength. The query is the tensor that the value vectors are compared with, h or y.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from braces_cli.core.adapter.gram import CachedGram, gram
from braces_cli.core.distributed import full_tensor
from braces_cli.core.models.weights import Values, double

# Initial gate, before the sigmoid: g = 0.0067, so training starts close to the base.
GATE_INIT = -5.0
# Hidden size of the MLP of attribute control.
WIDTH = 64
# On a CPU a product of so few tokens takes up to ten times as long in 16 bits as in float32.
_FEW_TOKENS = 16


# Reads a parameter, gathered if it is sharded.
Read = Callable[[Tensor], Tensor]


def orthonormal_rows(weight: Tensor) -> Tensor:
    """R = L^-1 M with L L^T = M M^T: Gram-Schmidt of the rows of `weight` (..., d_r, d), differentiable.

    If the rows are orthonormal, L is the identity and R = M up to rounding.
    """
    if weight.device.type == "mps":  # its linear algebra is incomplete
        return orthonormal_rows(weight.cpu()).to(weight)
    # cholesky_ex without the error check, which would copy a flag to the host and stall a GPU at every layer.
    factor, _ = torch.linalg.cholesky_ex(weight @ weight.mT)
    return torch.linalg.solve_triangular(factor, weight, upper=False)


def projection_error(projection: Tensor) -> float:
    """max |R R^T - I| of a projection (d_r, d), computed in float64."""
    projection = projection.detach().cpu().double()
    return float((projection @ projection.mT - torch.eye(len(projection), dtype=torch.float64)).abs().max())


class ConditionMLP(nn.Module):
    """h_c = p + (MLP(p) - MLP(-p)) / 2 with MLP: d -> 64 -> d, GELU; in float32, one for all layers.

    The last layer starts at zero, so training starts from h_c = p. The function is odd, h_c(-p) = -h_c(p): strength s
    of an attribute is strength -s of its opposite. With p + MLP(p), training also learns what rows of both opposites
    have in common, such as their style, and steering with -s then removes the style (measured: recipes/RESULTS.md).
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.up = nn.Linear(hidden_size, WIDTH)
        self.act = nn.GELU()
        # A bias would cancel.
        self.down = nn.Linear(WIDTH, hidden_size, bias=False)
        nn.init.zeros_(self.down.weight)

    def forward(self, state: Tensor) -> Tensor:
        positive, negative = self.act(self.up(torch.stack([state, -state])))
        result: Tensor = state + self.down(positive - negative) / 2
        return result


def condition_shapes(hidden_size: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the MLP's tensors in an adapter file."""
    return {
        "condition.up.weight": (WIDTH, hidden_size),
        "condition.up.bias": (WIDTH,),
        "condition.down.weight": (hidden_size, WIDTH),
    }


class RelevanceModule(nn.Module):
    """Projection and gate of one FFN, and the side path that they add to its output.

    Parameters, in float32 for every dtype of the base: `weight` (d_r, d), unconstrained, whose orthonormalised form is
    R; `gate` (1,) before the sigmoid, because FSDP2 does not support scalar parameters. With relevance to the output
    `weight` gives R_q, `key` (d_r, d) gives R_k, and `diagonal` (d_r,), zero at the start, is D in the place of `gate`.
    `scale` is c, not trained.

    Args:
        rank: d_r.
        hidden_size: d.
        device: of the base's value matrix; "meta" allocates nothing.
        generator: of the initial projections, orthonormal rows of Gaussian matrices.
        scale: c.
        relevance_to: "input" if the query is the FFN's input, "output" if it is the FFN's output.
    """

    def __init__(
        self,
        rank: int,
        hidden_size: int,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
        scale: float = 1.0,
        relevance_to: str = "input",
    ) -> None:
        super().__init__()
        self.rank = rank
        self.scale = scale
        self.relevance_to = relevance_to
        self.enabled = True

        def start() -> nn.Parameter:
            if torch.device(device or "cpu").type == "meta":
                return nn.Parameter(torch.empty(rank, hidden_size, device="meta"))
            noise = torch.randn(hidden_size, rank, dtype=torch.float64, generator=generator)
            rows = torch.linalg.qr(noise).Q.mT
            return nn.Parameter(rows.to(device, torch.float32, memory_format=torch.contiguous_format))

        self.weight = start()
        if relevance_to == "output":
            self.key = start()
            self.diagonal = nn.Parameter(torch.zeros(rank, device=device))
        else:
            self.gate = nn.Parameter(torch.full((1,), GATE_INIT, device=device))
        # Steering, added to R times the query: (d_r,) for all tokens, (batch, 1, d_r) or (batch, tokens, d_r).
        self.shift: Tensor | None = None
        # Versions of `weight` and `key` with orthonormal rows, for which R is `weight`, bit for bit.
        self._exact: tuple[int, ...] | None = None
        # (A, B) of each value matrix and dtype for inference, and the state of the parameters they were computed from.
        self._factors: dict[tuple[Any, torch.dtype], tuple[Tensor, Tensor]] = {}
        self._factors_state: tuple | None = None
        self._cached_gram: CachedGram | None = None
        self._register()

    @property
    def g(self) -> Tensor:
        """sigmoid(gate), shape (1,); with relevance to the output D, (d_r,)."""
        return self.diagonal if self.relevance_to == "output" else self.gate.sigmoid()

    @property
    def stored(self) -> dict[str, nn.Parameter]:
        """Parameters by their names in an adapter file."""
        if self.relevance_to == "output":
            return {"projection": self.weight, "key_projection": self.key, "diagonal": self.diagonal}
        return {"projection": self.weight, "gate": self.gate}

    def cache_gram(self, enable: bool) -> None:
        """Cache W_V W_V^T in training (see `core.adapter.gram`), or free it; for modules with one W_V."""
        self._cached_gram = CachedGram() if enable else None

    def release(self) -> None:
        """Free the cached W_V W_V^T; it is computed again when needed, bit-identical."""
        if self._cached_gram is not None:
            self._cached_gram.drop()

    def projection(self, read: Read = full_tensor, *, of_values: bool = False) -> Tensor:
        """R (d_r, d), the factor A, differentiable in `weight`. `of_values`: the projection of the value vectors."""
        weight = self.key if of_values and self.relevance_to == "output" else self.weight
        # In this order, because torch.compile can trace `_is_training`, not a version counter.
        exact = not self._is_training() and self._exact == self._versions()
        matrix = read(weight)
        if exact:
            return matrix
        with torch.autocast(matrix.device.type, enabled=False):
            return orthonormal_rows(matrix)

    def tensors(self, in_place: bool) -> dict[str, Tensor]:
        """Tensors of an adapter file: the projections, rounded once from float64, and the gate. Collective.

        Args:
            in_place: also set the weights to the projections, so that R is `weight`, bit for bit, until the next
                optimizer step.
        """
        found: dict[str, Tensor] = {name: full_tensor(parameter.detach()) for name, parameter in self.stored.items()}
        if self._exact == self._versions():
            return found
        weights = {name: weight for name, weight in found.items() if name.endswith("projection")}
        found |= {name: orthonormal_rows(double(weight)).to(weight) for name, weight in weights.items()}
        if in_place:
            with torch.no_grad():
                for name, parameter in self.stored.items():
                    parameter.copy_(found[name])
            self.set_exact()
        return found

    def set_exact(self) -> None:
        """Declare that the rows of the projections are orthonormal, as in a checked file."""
        self._exact = self._versions()
        self._factors_state = None

    def _versions(self) -> tuple[int, ...]:
        return tuple(weight._version for name, weight in self.stored.items() if name.endswith("projection"))

    def relevance_scores(self, query: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """`scores` of the tokens with this query (..., d), without steering."""
        projection = self.projection()
        return self.scores(query.float() @ projection.to(query.device, torch.float32).mT, values)

    def scores(self, ranked: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """r_ij of every value vector j, (..., d_ff) in float32, and g r_ij, the change of its weight.

        Materialises full matrices; for inspection only.

        Args:
            ranked: A times the query, or the shift of steering, (..., d_r).
        """
        ranked, g = ranked * (self.scale / math.sqrt(self.rank)), self.g.to(ranked)
        compared = self.projection(of_values=True).to(ranked) @ values.to(ranked)
        if self.relevance_to == "output":
            scores = (ranked * g) @ compared
            return scores, scores
        scores = ranked @ compared
        return scores, g * scores

    def factors(self, values: Values, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A (d_r, d) and B (..., d, d_r) in `dtype`, for the value matrix or matrices `values` (..., d, d_ff).

        In training they are computed once per forward pass, otherwise once until a parameter changes. Only training
        uses the cached W_V W_V^T: a saved adapter must not depend on how it was trained.
        """
        if not torch.compiler.is_compiling():
            return self._eager_factors(values, dtype)
        if not isinstance(values, Tensor):
            return self._untraced_factors(values, dtype)
        if self._is_training():
            return self._compute_factors(values, dtype)
        down, up = _cached_factors([*self.parameters(recurse=False)], values, self._handle, dtype)
        return down, up

    # torch.compile cannot trace the unpacking of weights: it breaks its graph here.
    @torch.compiler.disable
    def _untraced_factors(self, values: Values, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return self._eager_factors(values, dtype)

    def _eager_factors(self, values: Values, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if self._is_training():
            product = gram if self._cached_gram is None else self._cached_gram.product
            return self._compute_factors(values, dtype, product)
        state = tuple((parameter._version, parameter.device) for parameter in self.parameters(recurse=False))
        if self._factors_state != state:
            self._factors, self._factors_state = {}, state
        key = (values.data_ptr() if isinstance(values, Tensor) else values.key, dtype)
        if key not in self._factors:
            self._factors[key] = self._compute_factors(values, dtype)
        return self._factors[key]

    def _compute_factors(
        self, values: Values, dtype: torch.dtype, product: Callable[[Values, Tensor], Tensor] = gram
    ) -> tuple[Tensor, Tensor]:
        projection = self.projection()
        compared = self.projection(of_values=True) if self.relevance_to == "output" else projection
        with torch.autocast(self.weight.device.type, enabled=False):
            out = product(values, compared.mT) * (self.g * self.scale / math.sqrt(self.rank))
        return projection.to(dtype), out.to(dtype)

    def _is_training(self) -> bool:
        return torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters(recurse=False))

    # An argument named `query` would make this module a token mixer (`core.models.structure`).
    def forward(self, output: Tensor, x: Tensor, values: Values) -> Tensor:
        """FFN output (..., d) plus the side path, for the query x (..., d) and W_V (d, d_ff)."""
        flat = output.reshape(-1, output.shape[-1])
        few = flat.device.type == "cpu" and flat.shape[0] <= _FEW_TOKENS
        dtype = torch.promote_types(flat.dtype, torch.float32) if few else flat.dtype
        down, up = self.factors(values, dtype)
        # With a device map the two ends of an FFN can be on two devices.
        ranked = self._ranked(x.to(flat.device, dtype), down).reshape(-1, self.rank)
        # One fused multiply-add over flat tokens, not a product and a sum.
        return torch.addmm(flat.to(dtype), ranked, up.mT).to(output.dtype).view(output.shape)

    def routed(self, output: Tensor, query: Tensor, index: Tensor, p: Tensor, values: Tensor) -> Tensor:
        """Output (n, d) of routed experts plus sum_e p_e B_e (A query_e + shift).

        Memory: n * experts * d_r numbers, and experts * d * d_r for B.

        Args:
            query: of each token, (n, 1, d), or of each of its k experts, (n, k, d).
            index: experts of each token, (n, k); others have an index past the last one, and nothing is added.
            p: factor of the output of each of these experts, (n, k).
            values: W_V of each expert, (experts, d, d_ff).
        """
        down, up = self.factors(values, output.dtype)
        ranked = F.linear(query.to(output.dtype), down)
        if self.shift is not None:
            ranked = ranked + self._shifts(len(query), output).unsqueeze(-2)
        weighed = p.to(output.dtype).unsqueeze(2) * ranked
        place = index.clamp(max=len(values)).unsqueeze(2).expand_as(weighed)
        spread = weighed.new_zeros(len(query), len(values) + 1, self.rank).scatter_add(1, place, weighed)
        spread = spread[:, : len(values)].flatten(1)
        flat = torch.addmm(output.reshape(-1, output.shape[-1]), spread, up.mT.reshape(-1, up.shape[1]))
        return flat.view(output.shape)

    def by_expert(self, output: Tensor, query: Tensor, values: Tensor) -> Tensor:
        """Output (experts * n, d) of experts with presorted tokens, plus B_e (A query + shift) of each.

        A row of zeros in `query` is a token that was not sent to the expert: nothing is added to it.
        """
        down, up = self.factors(values, output.dtype)
        query = query.to(output.dtype)
        flat = query.reshape(len(values), -1, query.shape[-1])
        ranked = F.linear(flat, down)
        if self.shift is not None:
            ranked = ranked + self._shifts(flat.shape[1], output) * (flat != 0).any(dim=-1, keepdim=True)
        return output + (ranked @ up.mT).reshape(output.shape)

    def _shifts(self, tokens: int, like: Tensor) -> Tensor:
        """The shift of each of `tokens` tokens, (tokens, d_r), or of all of them, (d_r,)."""
        assert self.shift is not None
        shift = self.shift.to(like)
        if shift.ndim == 1:
            return shift
        return shift.expand(-1, tokens // len(shift), -1).reshape(tokens, self.rank)

    def _ranked(self, query: Tensor, down: Tensor) -> Tensor:
        """A query + shift, (..., d_r)."""
        if self.shift is None:
            return F.linear(query, down)
        if self.shift.ndim == 1:
            # A shift of all tokens is the bias of the product, at no cost.
            return F.linear(query, down, self.shift.to(query))
        # OPT flattens rows and tokens before its FFN.
        return F.linear(query, down).reshape(len(self.shift), -1, self.rank) + self.shift.to(query)

    def _register(self) -> None:
        self._handle = next(_handles)
        _modules[self._handle] = self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._register()  # a copy needs another handle

    def train(self, mode: bool = True) -> RelevanceModule:
        # Some optimizers write through `.data`, which does not change version counters.
        self._factors_state = None
        if not mode:
            self.release()
        return super().train(mode)

    def _apply(self, fn: Callable, recurse: bool = True) -> RelevanceModule:
        # `model.to(torch.bfloat16)` moves the projection, but must not round it.
        def keep_precision(tensor: Tensor) -> Tensor:
            moved: Tensor = fn(tensor)
            return tensor.to(moved.device) if moved.dtype.itemsize < tensor.dtype.itemsize else moved

        exact = self._exact == self._versions()
        super()._apply(keep_precision, recurse)
        self._factors_state = None
        self.release()
        self._exact = self._versions() if exact else None
        return self


# Modules by number, for compiled graphs: an operator takes tensors and numbers only.
_handles = count()
_modules: WeakValueDictionary[int, RelevanceModule] = WeakValueDictionary()


@torch.library.custom_op("braces::cached_factors", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _cached_factors(parameters: list[Tensor], values: Tensor, handle: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cached factors as one operator of a compiled graph, so that version counters are read when the graph runs.

    Returns copies, because a compiler may reuse the memory of results. Not for CUDA graphs, which would always replay
    the factors of the first run.
    """
    with torch.no_grad():
        down, up = _modules[handle]._eager_factors(values, dtype)
    return down.clone(memory_format=torch.contiguous_format), up.clone(memory_format=torch.contiguous_format)


@_cached_factors.register_fake
def _(parameters: list[Tensor], values: Tensor, handle: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    rank, width = parameters[0].shape
    down = parameters[0].new_empty(rank, width, dtype=dtype)
    return down, parameters[0].new_empty(*values.shape[:-2], width, rank, dtype=dtype)
