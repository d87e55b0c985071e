"""The forms of relevance, by name. Light: no torch here.

paper     r_ij = g (R v_j) . (R h_i) / sqrt(d_r)        one gate g in (0, 1) a layer; the paper's section 3.1
signed    r_ij = (R v_j)^T diag(c) (R h_i)              one free, signed coefficient a direction
untied    r_ij = (R_k v_j)^T diag(c) (R_q h_i)          keys and queries projected apart, as attention does
whitened  r_ij = (R_k G^-1 v_j)^T diag(c) (R_q h_i)     the same between whitened value vectors, G = W_V W_V^T
"""

from __future__ import annotations

from typing import Any

FORMS = ("paper", "signed", "untied", "whitened")
# Those whose queries have a projection of their own.
QUERY_FORMS = ("untied", "whitened")


def layer_shapes(form: str, rank: int, hidden_size: int) -> dict[str, tuple[int, ...]]:
    """Tensors of one layer in an adapter file, without the `layers.{i}.` before their names, and their shapes."""
    shapes: dict[str, tuple[int, ...]] = {"projection": (rank, hidden_size)}
    if form in QUERY_FORMS:
        shapes["query_projection"] = (rank, hidden_size)
    # One dimension for the paper's gate too, because FSDP2 takes no scalar parameter.
    return shapes | {"gate": (1,) if form == "paper" else (rank,)}


def gate_values(form: str, gate: Any) -> Any:
    """What the stored tensor `gate` stands for: sigmoid(gate) for `paper`, else the coefficients themselves."""
    return gate.sigmoid() if form == "paper" else gate


def gate_strength(form: str, gate: Any) -> float:
    """One number for how far a layer is open: g for `paper`, else the root mean square of the coefficients."""
    return float(gate_values(form, gate).detach().pow(2).mean().sqrt())
