"""The streamed k best against a stable sort of everything."""

from __future__ import annotations

import pytest
import torch

from braces_cli.inspection.vocabulary import TopK


@pytest.mark.parametrize("k", [1, 3, 10, 70])
@pytest.mark.parametrize("block", [1, 37, 1000, 1701])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_a_stable_sort_with_many_ties(k, block, dtype):
    """Of equal scores the lower id comes first, wherever blocks and groups are cut."""
    generator = torch.Generator().manual_seed(k * block)
    scores = (torch.randint(-12, 13, (9, 5003), generator=generator) / 3).to(dtype)
    top = TopK(9, k)
    for start in range(0, 5003, block):
        top.add(scores[:, start : start + block], start)
    values, ids = top.result()
    order = scores.float().sort(dim=1, descending=True, stable=True)
    assert torch.equal(ids, order.indices[:, :k])
    assert torch.equal(values, order.values[:, :k])


@pytest.mark.parametrize("kind", ["ascending", "equal", "mostly equal", "below none"])
def test_scores_of_which_many_pass_the_sieve(kind, monkeypatch):
    """Each block better than all before, or as good; rows in several parts; rows that need nothing beside others."""
    monkeypatch.setattr("braces_cli.inspection.vocabulary._ROWS", 2)
    scores = {
        "ascending": torch.arange(4000.0).repeat(5, 1),
        "equal": torch.zeros(5, 4000),
        "mostly equal": torch.where(torch.arange(4000) % 700 == 3, 1.0, -2.0).repeat(5, 1),
        "below none": torch.full((5, 4000), -torch.inf),
    }[kind]
    scores[1] = -scores[1]
    scores[2] = scores[2].flip(0)
    top = TopK(5, 4)
    for start in range(0, 4000, 900):
        top.add(scores[:, start : start + 900], start)
    values, ids = top.result()
    order = scores.sort(dim=1, descending=True, stable=True)
    assert torch.equal(ids, order.indices[:, :4])
    assert torch.equal(values, order.values[:, :4])


def test_zeros_of_both_signs_are_equal():
    """-0 does not stand behind 0."""
    top = TopK(1, 3)
    top.add(torch.tensor([[-0.0, 0.0, -1.0]]), 0)
    assert top.result()[1].tolist() == [[0, 1, 2]]


def test_scores_that_are_no_numbers():
    """The tokens of a broken vector are tokens all the same, and do not touch other vectors."""
    scores = torch.stack([torch.full((2000,), torch.nan), torch.arange(2000.0), torch.arange(2000.0)])
    scores[1, 7] = torch.nan
    top = TopK(3, 3)
    for start in (0, 1000):
        top.add(scores[:, start : start + 1000], start)
    ids = top.result()[1]
    assert ids[2].tolist() == [1999, 1998, 1997]
    assert ids.max() < 2000


def test_fewer_scores_than_k():
    """All of them."""
    top = TopK(2, 5)
    top.add(torch.tensor([[1.0, 2.0], [2.0, 1.0]]), 0)
    assert top.result()[1].tolist() == [[1, 0], [0, 1]]
