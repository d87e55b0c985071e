"""p-values against values known from elsewhere."""

from __future__ import annotations

import math

import pytest
from scipy.stats import binom, ttest_rel

from braces_cli.evaluation.significance import mcnemar, p_value, paired_bootstrap


def test_mcnemar_counts_only_the_documents_that_differ():
    a = [1.0] * 10 + [0.0] * 2 + [1.0] * 50 + [0.0] * 7
    b = [0.0] * 10 + [1.0] * 2 + [1.0] * 50 + [0.0] * 7
    assert mcnemar(a, b) == pytest.approx(2 * binom.cdf(2, 12, 0.5)) == pytest.approx(0.03857421875)
    assert mcnemar(b, a) == mcnemar(a, b)


def test_one_sixth_heads_by_hand():
    # 5 documents differ, all one way: 2 / 2^5.
    assert mcnemar([1.0] * 5, [0.0] * 5) == pytest.approx(0.0625)


def test_equal_outcomes_give_one():
    assert mcnemar([0.0, 1.0], [0.0, 1.0]) == 1.0
    assert paired_bootstrap([0.3, 0.2], [0.3, 0.2]) == 1.0


def test_the_bootstrap_agrees_with_the_paired_t_test_on_many_documents():
    import numpy as np

    generator = np.random.default_rng(3)
    a = generator.normal(size=400)
    b = a + generator.normal(0.08, 1.0, size=400)
    expected = ttest_rel(a, b).pvalue
    assert 0.01 < expected < 0.5
    assert paired_bootstrap(a, b) == pytest.approx(expected, abs=0.02)
    assert paired_bootstrap(a, b, seed=1) == paired_bootstrap(a, b, seed=1)


def test_weights_make_it_a_ratio():
    # One long document decides the ratio, though the short ones all say the opposite.
    a, b = [0.0] * 9, [1.0] * 8 + [-1000.0]
    assert paired_bootstrap(a, b) > 0.3
    assert paired_bootstrap(a, [2.0] * 9, [1.0] * 9) < 0.005


def test_three_documents_prove_nothing():
    assert paired_bootstrap([0.0, 0.0, 0.0], [1.0, 1.01, 0.99]) == 0.25
    assert paired_bootstrap([0.0], [1.0]) == 1.0


def test_documents_are_matched_by_id():
    a = dict.fromkeys(range(5), 1.0)
    b = {4: 0.0, 3: 0.0, 2: 0.0, 1: 0.0, 0: 0.0, 99: 1.0}
    assert p_value(a, b) == pytest.approx(0.0625)
    assert p_value(a, {7: 1.0}) is None
    assert p_value({0: math.nan}, {0: 0.5}) is None
