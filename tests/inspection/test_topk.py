"""The streamed k best against a stable sort of everything."""

from __future__ import annotations

import pytest
import torch

from braces_cli.inspection.topk import TopK


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


def test_zeros_of_both_signs_are_equal():
    """-0 does not stand behind 0."""
    top = TopK(1, 3)
    top.add(torch.tensor([[-0.0, 0.0, -1.0]]), 0)
    assert top.result()[1].tolist() == [[0, 1, 2]]


def test_fewer_scores_than_k():
    """All of them."""
    top = TopK(2, 5)
    top.add(torch.tensor([[1.0, 2.0], [2.0, 1.0]]), 0)
    assert top.result()[1].tolist() == [[1, 0], [0, 1]]
