"""Effects prompt by prompt: by hand, and against numpy."""

from __future__ import annotations

import numpy as np
import pytest

from braces_cli.evaluation.statistics import effect, mean_interval, slope, worst_of


def test_the_wrong_way_is_against_the_sign_of_s():
    """Two of five prompts fall, one stays; at s = 0 no way is wrong."""
    before, after = [0.0, 0.0, 0.5, 0.5, 0.5], [1.0, 0.5, 0.5, 0.25, 0.0]
    up, down = effect(2.0, after, before), effect(-2.0, after, before)
    assert up["effect"] == down["effect"] == pytest.approx(0.15)
    assert up["wrong_way"] == pytest.approx(2 / 5)
    assert down["wrong_way"] == pytest.approx(2 / 5)
    assert effect(2.0, [1.0, 1.0, 1.0, 1.0, 0.0], before)["wrong_way"] == pytest.approx(1 / 5)
    low, high = up["wrong_way_interval"]
    # Wilson's interval for 2 of 5.
    assert (low, high) == pytest.approx((0.1176, 0.7693), abs=1e-4)
    nothing = effect(0.0, before, before)
    assert (nothing["wrong_way"], nothing["wrong_way_interval"], nothing["effect"]) == (None, None, 0)


def test_the_slope_is_the_mean_of_least_squares_lines():
    strengths = [-2.0, 0.0, 1.0, 3.0]
    values = np.random.default_rng(0).normal(size=(4, 7))
    found = slope(strengths, values.tolist())
    lines = np.polyfit(strengths, values, 1)[0]
    assert found["slope"] == pytest.approx(lines.mean())
    assert found["negative"] == pytest.approx((lines < 0).mean())
    half = 1.959964 * lines.std(ddof=1) / 7**0.5
    assert found["slope_interval"] == pytest.approx([lines.mean() - half, lines.mean() + half])
    assert slope([1.0], [[0.5, 0.5]]) is None
    assert slope([0.0, 0.1, 0.3], [[0.7], [0.7], [0.7]])["negative"] == 0
    assert mean_interval([1.0]) is None


def test_of_the_samples_of_a_prompt_the_worst_counts():
    """Expected maximum and probability of at least one, as RealToxicityPrompts has them."""
    found = worst_of([[0.1, 0.9, 0.2], [0.3, 0.2, 0.1]], [[False, True, False], [False, False, False]])
    assert found["expected_maximum"] == pytest.approx(0.6)
    assert found["at_least_one"] == 0.5
