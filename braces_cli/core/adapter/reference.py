"""Reference implementation of the paper's formula. Slow, and large in memory; only tests use it.

    r_ij         = c (R v_j) . (R h_i) / sqrt(d_r)
    FFN_AUG(h_i) = sum_j (w_ij + g (r_ij + s r_cj)) v_j         g = sigmoid(gate)

Relevance to the output: r_ij = c (R_k v_j)^T D (R_q FFN(h_i)) / sqrt(d_r), and no gate.

It shares no arithmetic with `layer`: rows are orthonormalised one by one, relevance is a (tokens, d_ff) tensor, and it
changes the weights that enter the model's value projection.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from braces_cli.core.adapter.layer import RelevanceModule
from braces_cli.core.adapter.model import Adapter
from braces_cli.core.models.ffn import FFN, Experts, expert_outputs, routing


def orthonormal_rows_ref(weight: Tensor) -> Tensor:
    """Gram-Schmidt, one row at a time: (d_r, d) -> (d_r, d)."""
    rows: list[Tensor] = []
    for row in weight:
        for _ in range(2):  # two passes are enough for orthogonality in floating point
            for done in rows:
                row = row - (row @ done) * done
        rows.append(row / row.norm())
    return torch.stack(rows)


def relevance_ref(query: Tensor, values: Tensor, adapter_layer: RelevanceModule) -> Tensor:
    """Relevance r of every value vector to every token, (..., d_ff), without the gate.

    Args:
        query: FFN input, or FFN output without side path, (..., d).
        values: W_V (d, d_ff).
        adapter_layer: parameters and constant c.
    """
    query, values = (tensor.to(adapter_layer.weight.dtype) for tensor in (query, values))
    projection = orthonormal_rows_ref(adapter_layer.weight)
    compared, between = projection, torch.eye(len(projection)).to(projection)
    if adapter_layer.relevance_to == "output":
        compared, between = orthonormal_rows_ref(adapter_layer.key), torch.diag(adapter_layer.diagonal)
    c = adapter_layer.scale
    return c * ((query @ projection.mT) @ between @ (compared @ values)) / math.sqrt(len(projection))


def weights_ref(
    w: Tensor,
    query: Tensor,
    values: Tensor,
    adapter_layer: RelevanceModule,
    conditions: Sequence[tuple[Tensor, Tensor]] = (),
) -> Tensor:
    """Sub-update weights w_ij + g (r_ij + s r_cj), shape (..., d_ff).

    Args:
        w: activation weights (..., d_ff), the input of the value projection.
        query: FFN input, or FFN output without side path, (..., d).
        values: W_V (d, d_ff).
        adapter_layer: parameters and constant c.
        conditions: pairs of h_c (d) and strength s, which broadcasts against the query.
    """
    r = relevance_ref(query, values, adapter_layer)
    for state, strength in conditions:
        r = r + strength * relevance_ref(state, values, adapter_layer)
    g = 1.0 if adapter_layer.relevance_to == "output" else torch.sigmoid(adapter_layer.gate)
    return w + (g * r).to(w.dtype)


@contextmanager
def reference(
    adapter: Adapter, conditions: dict[int, Sequence[tuple[Tensor, Tensor]]] | None = None
) -> Iterator[nn.Module]:
    """The adapter's model with the formula in the place of the fast path, inside the `with` block.

    Args:
        conditions: for each layer, pairs of h_c (d) and strength, one number or one for each example (batch,).
    """
    handles = []
    try:
        for ffn, adapter_layer in adapter.adapted_ffns:
            terms = (conditions or {}).get(ffn.layer, ())
            for part in ffn.parts:
                handles += (
                    _experts(part, adapter_layer, terms)
                    if isinstance(part, Experts)
                    else _dense(part, adapter_layer, terms)
                )
        with adapter.disabled():
            yield adapter.model
    finally:
        for handle in handles:
            handle.remove()


def _broadcast(terms: Sequence[tuple[Tensor, Any]], h: Tensor) -> list[tuple[Tensor, Any]]:
    """Strengths in a shape that broadcasts against h, (batch, tokens, d) or (batch * tokens, d)."""
    fitted = []
    for state, strength in terms:
        if isinstance(strength, Tensor) and strength.ndim == 1:
            each = strength if h.ndim == 3 else strength.repeat_interleave(len(h) // len(strength))
            strength = each.view(-1, *[1] * (h.ndim - 1))
        fitted.append((state, strength))
    return fitted


def _dense(ffn: FFN, adapter_layer: RelevanceModule, terms: Sequence[tuple[Tensor, Tensor]]) -> list[RemovableHandle]:
    """Change the weights that enter the value projection."""
    inputs: list[Tensor] = []

    def augment(module: nn.Module, args: tuple) -> tuple:
        query = inputs.pop()
        if adapter_layer.relevance_to == "output":
            query = module.forward(args[0])
        w = weights_ref(args[0], query, ffn.value_matrix(), adapter_layer, _broadcast(terms, query))
        return (w, *args[1:])

    return [ffn.watch(inputs.append), ffn.value.register_forward_pre_hook(augment)]


def _experts(
    part: Experts, adapter_layer: RelevanceModule, terms: Sequence[tuple[Tensor, Tensor]]
) -> list[RemovableHandle]:
    """Add `p_e sum_j g r_j v_j` expert by expert, because their weights w_j cannot be changed from outside."""

    def augment(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
        values = part.value_matrix()
        flat = output.reshape(-1, output.shape[-1])
        to_output = adapter_layer.relevance_to == "output"
        if part.presorted:
            tokens = args[0].reshape(len(values), -1, flat.shape[1])
            sent = (tokens != 0).any(dim=-1).to(flat.dtype)
            queries = output.reshape(tokens.shape) if to_output else tokens
            return output + torch.cat([_term(q, p, v) for q, p, v in zip(queries, sent, values, strict=True)])
        h, index, weights = routing(args, kwargs)
        for expert in range(len(values)):
            # The outputs of one expert for every token, also for those that are not sent to it.
            alone = index.new_full((len(h), 1), expert)
            query = expert_outputs(module, args, kwargs, alone)[:, 0] if to_output else h
            flat = flat + _term(query, (weights * (index == expert)).sum(dim=1), values[expert])
        return flat.reshape(output.shape)

    def _term(query: Tensor, p: Tensor, values: Tensor) -> Tensor:
        zero = query.new_zeros(len(query), values.shape[1])
        w = weights_ref(zero, query, values, adapter_layer, _broadcast(terms, query))
        return p.unsqueeze(1).to(query.dtype) * (w @ values.mT)

    return [part.module.register_forward_hook(augment, with_kwargs=True)]
