"""The vectors that promote a concept or an attribute most, against direct computations."""

from __future__ import annotations

import math

import pytest
import torch

from braces_cli.core.adapter.files import find_adapter
from braces_cli.core.adapter.reference import relevance_ref
from braces_cli.core.attributes.lookup import find_attribute
from braces_cli.core.attributes.vector import STEERING_SHARE
from braces_cli.inspection import vocabulary
from braces_cli.inspection.maps import Concept, best_first
from braces_cli.inspection.search import attribute_relevance, top_vectors_for_attribute, top_vectors_for_concept
from braces_cli.inspection.vocabulary import LogitLens
from tests.conftest import make_adapter
from tests.core.architectures import tiny
from tests.inspection.conftest import opened
from tests.inspection.test_vocabulary import expected_scores


@pytest.mark.parametrize("name", ["llama", "mixtral", "deepseek_v3"])
def test_vectors_for_a_concept(name, monkeypatch):
    """Rank and score of every vector, sorted; in blocks that do not divide the experts evenly."""
    monkeypatch.setattr(vocabulary, "VECTORS_AT_ONCE", 11)
    session = opened(name if name == "llama" else tiny(name).eval())
    rows = []
    for layer, scores in enumerate(expected_scores(session.base.model)):
        for index, row in enumerate(scores):
            rank = int((row > row[40]).sum()) + 1
            rows.append({"layer": layer, "index": index, "rank": rank, "score": float(row[40])})
    expected = sorted(rows, key=best_first)[:6]
    found = top_vectors_for_concept(LogitLens(session.base), session.ffns, Concept([[(40,)]]), limit=6, top_k=3)
    for row, other in zip(found, expected, strict=True):
        assert (row["layer"], row["index"], row["rank"]) == (other["layer"], other["index"], other["rank"])
        assert row["score"] == pytest.approx(other["score"], rel=1e-4)
        assert len(row["tokens"]) == 3
    if found[0]["rank"] <= 3:
        assert found[0]["tokens"][found[0]["rank"] - 1]["id"] == 40


@pytest.mark.parametrize("relevance", ["input", "output"])
def test_relevance_with_an_adapter_is_the_formula(session, lens, tmp_path, relevance):
    """r_c = c (R W_V)^T (R h_c) / sqrt(d_r)."""
    session.add_adapter(find_adapter(str(make_adapter(session, tmp_path / "adapter", relevance_to=relevance))))
    attribute = find_attribute(session, "positive", None)
    scores = []
    for row, (ffn, module) in enumerate(session.adapter.adapted_ffns):
        expected = relevance_ref(
            attribute.state_at(relevance)[row], ffn.value_matrix(), module.weight.detach(), module.scale
        )
        assert torch.allclose(attribute_relevance(session, attribute, ffn), expected, rtol=1e-4, atol=1e-6)
        scores += [(float(score), ffn.layer, index) for index, score in enumerate(expected)]
    found = top_vectors_for_attribute(session, lens, session.ffns, attribute, limit=4)
    assert [(row["layer"], row["index"]) for row in found] == [each[1:] for each in sorted(scores, reverse=True)[:4]]


def test_relevance_without_an_adapter_sums_to_the_steering_vector(session):
    """sum_j r_cj v_j is the vector that steering adds."""
    attribute = find_attribute(session, "positive", None)
    for row, ffn in enumerate(session.ffns):
        added = ffn.value_matrix().detach() @ attribute_relevance(session, attribute, ffn)
        expected = float(attribute.scale[row]) * attribute.steering_direction[row]
        assert torch.allclose(added, expected, rtol=1e-4, atol=1e-5)
        assert math.isclose(float(added.norm()), STEERING_SHARE * float(attribute.residual[row]), rel_tol=1e-3)
