"""Which vectors promote a concept or an attribute most."""

from __future__ import annotations

import math

import pytest
import torch

from braces_cli.core.adapter.files import find_adapter
from braces_cli.inspection.maps import best_first
from braces_cli.inspection.search import (
    attribute_relevance,
    model_concept,
    top_vectors_for_attribute,
    top_vectors_for_concept,
)
from tests.conftest import make_adapter


def test_promoting_vectors_are_those_of_a_direct_computation(session):
    """Rank and score of every vector, sorted."""
    model = session.base.model
    words = model_concept(session, [" film"])
    (token,) = words.tokens
    rows = []
    for number, layer in enumerate(model.model.layers):
        scores = model.lm_head(model.model.norm(layer.mlp.down_proj.weight.T)).detach()
        for index, row in enumerate(scores):
            rows.append(
                {"layer": number, "index": index, "rank": int((row > row[token]).sum()) + 1, "score": float(row[token])}
            )
    expected = sorted(rows, key=best_first)[:6]
    found = top_vectors_for_concept(session, words, limit=6, top_k=3)
    assert [(r["layer"], r["index"], r["rank"]) for r in found] == [
        (r["layer"], r["index"], r["rank"]) for r in expected
    ]
    assert [r["score"] for r in found] == pytest.approx([r["score"] for r in expected], rel=1e-5)
    assert all(len(r["tokens"]) == 3 for r in found)


def test_relevance_of_an_attribute_is_the_formula(session, tmp_path):
    """r_c = c (R W_V)^T (R h_c) / sqrt(d_r), written out."""
    from braces_cli.core.adapter.reference import relevance_ref
    from braces_cli.core.attributes.lookup import find_attribute

    session.add_adapter(find_adapter(str(make_adapter(session, tmp_path / "adapter"))))
    attribute = find_attribute(session, "positive", None)
    everything = []
    for row, (ffn, adapter_layer) in enumerate(session.adapter.adapted_ffns):
        expected = relevance_ref(
            attribute.state[row], ffn.value_matrix(), adapter_layer.weight.detach(), adapter_layer.scale
        )
        assert torch.allclose(attribute_relevance(session, attribute, ffn), expected, rtol=1e-4, atol=1e-6)
        everything += [(float(score), ffn.layer, index) for index, score in enumerate(expected)]
    best = sorted(everything, reverse=True)[:4]
    assert [(r["layer"], r["index"]) for r in top_vectors_for_attribute(session, attribute, limit=4)] == [
        b[1:] for b in best
    ]


def test_without_an_adapter_relevance_sums_to_what_steering_adds(session):
    """sum_j r_cj v_j is the vector that steering from a word list adds."""
    from braces_cli.core.attributes.lookup import find_attribute
    from braces_cli.core.attributes.pooling import STEERING_SHARE

    attribute = find_attribute(session, "positive", None)
    for row, ffn in enumerate(session.ffns):
        moved = ffn.value_matrix().detach() @ attribute_relevance(session, attribute, ffn)
        expected = float(attribute.scale[row]) * attribute.steering_direction[row]
        assert torch.allclose(moved, expected, rtol=1e-4, atol=1e-5)
        assert math.isclose(float(moved.norm()), STEERING_SHARE * float(attribute.residual[row]), rel_tol=1e-3)
