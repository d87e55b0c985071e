"""Final norm and LM head, block by block, against the whole."""

from __future__ import annotations

import pytest
import torch

from braces_cli.core.models.ffn import find_ffns
from braces_cli.inspection import vocabulary
from braces_cli.inspection.vocabulary import LogitLens
from tests.conftest import ARCHITECTURES, tiny_model


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_blocks_of_the_vocabulary_give_what_the_whole_does(name, monkeypatch):
    """Every architecture, with biased heads, cut where nothing divides evenly."""
    monkeypatch.setattr(vocabulary, "_TOKENS_AT_ONCE", 37)
    monkeypatch.setattr(vocabulary, "VECTORS_AT_ONCE", 11)
    model = tiny_model(name)
    vectors = find_ffns(model)[1].value_matrix().mT
    values, ids = LogitLens(model).best(vectors, 7)
    whole = LogitLens(model)(vectors)
    assert torch.allclose(values, whole.sort(dim=1, descending=True).values[:, :7], atol=1e-5)
    assert torch.allclose(values, whole.gather(1, ids), atol=1e-5)
    ranks, scores = LogitLens(model).ranks(vectors, [3, 50])
    assert torch.allclose(scores, whole[:, [3, 50]], atol=1e-5)
    assert (ranks[:, 0] == (whole > whole[:, [3]]).sum(dim=1) + 1).float().mean() > 0.95


def test_a_head_that_cannot_be_cut_is_used_whole(monkeypatch):
    """A packed head has no rows to take; the result is the same."""
    model = tiny_model("phi")
    vectors = find_ffns(model)[0].value_matrix().mT
    expected, row = LogitLens(model).best(vectors, 5), LogitLens(model).row(7)
    monkeypatch.setattr(vocabulary.LogitLens, "_plain", lambda self: False)
    found = LogitLens(model)
    assert torch.equal(found.best(vectors, 5)[1], expected[1])
    assert torch.allclose(found.row(7)[0], row[0], atol=1e-5)
    assert found.row(7)[1] == pytest.approx(row[1], abs=1e-5)


def test_never_holds_all_scores(monkeypatch):
    """No tensor of vectors x vocabulary is ever asked of the head."""
    monkeypatch.setattr(vocabulary, "_TOKENS_AT_ONCE", 16)
    model = tiny_model("llama")
    sizes = []
    blocks = vocabulary.LogitLens.blocks

    def watched(self, hidden):
        for start, scores in blocks(self, hidden):
            sizes.append(scores.shape[1])
            yield start, scores

    monkeypatch.setattr(vocabulary.LogitLens, "blocks", watched)
    monkeypatch.setattr(vocabulary.LogitLens, "__call__", lambda *a: pytest.fail("scored the whole vocabulary"))
    LogitLens(model).best(find_ffns(model)[0].value_matrix().mT, 5)
    assert set(sizes) == {16}


def test_half_precision_scores_are_near_those_of_the_model():
    """bfloat16 weights, whatever dtype the products are taken in."""
    model = tiny_model("llama", torch.bfloat16)
    vectors = find_ffns(model)[0].value_matrix().mT
    values, ids = LogitLens(model).best(vectors, 5)
    assert torch.allclose(values, LogitLens(model)(vectors).gather(1, ids), rtol=2e-2, atol=2e-1)
