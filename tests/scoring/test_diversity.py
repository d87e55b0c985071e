"""distinct-n and repetition, against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest

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
