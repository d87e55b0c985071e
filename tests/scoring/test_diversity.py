"""distinct-n, repetition and intervals, against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest

from braces_cli.evaluation.statistics import cluster_error, rate_error, share_interval
from braces_cli.scoring.scorers import distinct, repetition


@pytest.mark.parametrize(
    ("groups", "width", "expected"),
    [
        ([["a b a b"]], 1, 2 / 4),
        ([["a b a b"]], 2, 2 / 3),
        ([["A b.", "a B!"]], 1, 4 / 6),  # a, b, ., ! of six pieces; case does not matter
        ([["a b", "a b"], ["c d"]], 2, (1 / 2 + 1) / 2),  # mean over prompts
        ([["a", ""], ["c d"]], 2, 1.0),  # nothing to count in the first
        ([["don't stop"]], 1, 1.0),
    ],
)
def test_distinct(groups, width, expected):
    """Different n-grams over all n-grams."""
    assert distinct(groups, width) == pytest.approx(expected)


def test_repetition():
    """4-grams that stood there before; a text too short for one is left out."""
    assert repetition(["a b c d a b c d"]) == pytest.approx(1 / 5)
    assert repetition(["a b c d a b c d", "x y z w", "x"]) == pytest.approx(1 / 10)
    assert math.isnan(repetition(["a b"]))
    assert math.isnan(distinct([[""]], 1))


def test_an_interval_counts_prompts_not_texts():
    """Samples that agree within a prompt say no more than one of them; others say as much as there are."""
    alike = share_interval([[True] * 5, [False] * 5] * 20)
    single = share_interval([[True], [False]] * 20)
    assert alike == pytest.approx(single, abs=0.01)
    spread = share_interval([[True, False] * 5] * 40)
    assert spread[1] - spread[0] < 0.5 * (single[1] - single[0])
    # Wilson at 0 of 40 prompts.
    assert share_interval([[False] * 5] * 40) == pytest.approx((0.0, 0.0876), abs=1e-3)


def test_errors_of_means_and_rates():
    """Against numpy's for equal groups; none for a single one."""
    import numpy as np

    values = np.random.default_rng(0).normal(size=(30, 4))
    expected = values.mean(axis=1).std(ddof=1) / math.sqrt(30)
    assert cluster_error(values.tolist()) == pytest.approx(expected)
    assert rate_error([2.0, 4.0, 6.0], [1.0, 2.0, 3.0]) == pytest.approx(0.0)
    assert rate_error(values[:, 0].tolist(), [1.0] * 30) == pytest.approx(values[:, 0].std(ddof=1) / math.sqrt(30))
    assert cluster_error([[1.0]]) is None
