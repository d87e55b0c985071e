"""Errors, intervals, comparisons and slopes: by hand and against scipy and numpy."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.stats import binom, ttest_rel

from braces_cli.evaluation import statistics
from braces_cli.evaluation.results import Metric, Scores
from braces_cli.evaluation.systems import System


def _system(name, *, adapter=None, strengths=None, **tasks):
    """A system with one metric per task, given by the values of its documents."""
    scores = Scores()
    for task, values in tasks.items():
        scores.results[task] = {"acc": Metric(sum(values) / len(values), None, len(values), dict(enumerate(values)))}
    terms = [(SimpleNamespace(name=each), s) for each, s in (strengths or {}).items()]
    return System(name, adapter, terms, scores)


def test_an_interval_depends_on_the_number_of_prompts():
    """Samples that agree within a prompt count as one; other samples count fully."""
    alike = statistics.share_interval([[True] * 5, [False] * 5] * 20)
    single = statistics.share_interval([[True], [False]] * 20)
    assert alike == pytest.approx(single, abs=0.01)
    spread = statistics.share_interval([[True, False] * 5] * 40)
    assert spread[1] - spread[0] < 0.5 * (single[1] - single[0])
    # Wilson at 0 of 40 prompts.
    assert statistics.share_interval([[False] * 5] * 40) == pytest.approx((0.0, 0.0876), abs=1e-3)


def test_errors_of_means_and_rates():
    values = np.random.default_rng(0).normal(size=(30, 4))
    expected = values.mean(axis=1).std(ddof=1) / math.sqrt(30)
    assert statistics.cluster_error(values.tolist()) == pytest.approx(expected)
    assert statistics.rate_error([2.0, 4.0, 6.0], [1.0, 2.0, 3.0]) == pytest.approx(0.0)
    assert statistics.rate_error(values[:, 0].tolist(), [1.0] * 30) == pytest.approx(
        values[:, 0].std(ddof=1) / math.sqrt(30)
    )
    assert statistics.cluster_error([[1.0]]) is None


def test_the_wrong_way_is_opposite_to_the_sign_of_s():
    """Two of five prompts fall, one stays; s = 0 has no wrong way."""
    before, after = [0.0, 0.0, 0.5, 0.5, 0.5], [1.0, 0.5, 0.5, 0.25, 0.0]
    up, down = statistics.effect(2.0, after, before), statistics.effect(-2.0, [1.0, 1.0, 1.0, 1.0, 0.0], before)
    assert (up["effect"], up["wrong_way"]) == pytest.approx((0.15, 2 / 5))
    assert down["wrong_way"] == pytest.approx(4 / 5)
    # Wilson's interval for 2 of 5.
    assert up["wrong_way_interval"] == pytest.approx([0.1176, 0.7693], abs=1e-4)
    nothing = statistics.effect(0.0, before, before)
    assert (nothing["wrong_way"], nothing["wrong_way_interval"], nothing["effect"]) == (None, None, 0)


def test_the_slope_is_the_mean_of_least_squares_lines():
    strengths = [-2.0, 0.0, 1.0, 3.0]
    values = np.random.default_rng(0).normal(size=(4, 7))
    found = statistics.slope(strengths, values.tolist())
    lines = np.polyfit(strengths, values, 1)[0]
    assert found["slope"] == pytest.approx(lines.mean())
    assert found["negative"] == pytest.approx((lines < 0).mean())
    half = 1.959964 * lines.std(ddof=1) / 7**0.5
    assert found["slope_interval"] == pytest.approx([lines.mean() - half, lines.mean() + half])
    assert statistics.slope([1.0], [[0.5, 0.5]]) is None
    assert statistics.slope([0.0, 0.1, 0.3], [[0.7], [0.7], [0.7]])["negative"] == 0


def test_holm_by_hand():
    # Sorted: 0.01 * 4, 0.02 * 3, 0.03 * 2, 0.04 * 1, none below the one before.
    assert statistics.holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert statistics.holm([0.6, 0.7]) == [1.0, 1.0]
    assert statistics.holm([]) == []


def test_p_is_corrected_over_all_that_a_run_compares():
    """Systems, strengths, tasks and metrics."""
    none, six, seven = [0.0] * 8, [1.0] * 6 + [0.0] * 2, [1.0] * 7 + [0.0]
    base, same, other = (
        _system(name, a=one, b=two, c=none)
        for name, one, two in (("base", none, none), ("same", none, none), ("other", six, seven))
    )
    same.terms = [(SimpleNamespace(name="x"), 1.0)]
    other.scores.results["b"]["again"] = other.scores.results["b"]["acc"]
    for system in (base, same):
        system.scores.results["b"]["again"] = system.scores.results["b"]["acc"]
    rows = statistics.compare([base, same, other], 0)
    moved = {(row["task"], row["metric"]): row for row in rows if row["to"] == "other"}
    assert [row["p_value"] for row in moved.values()] == pytest.approx([2 / 64, 2 / 128, 2 / 128, 1.0])
    assert [row["p_holm"] for row in moved.values()] == pytest.approx([2 / 64 * 6, 2 / 128 * 8, 2 / 128 * 8, 1.0])
    assert [row["p_holm"] for row in rows] == statistics.holm([row["p_value"] for row in rows])
    assert not any(row["significant"] for row in rows)
    alone = {row["task"]: row for row in statistics.compare([base, other], 0) if row["metric"] == "acc"}
    assert alone["b"]["p_holm"] == pytest.approx(2 / 128 * 4)
    (row,) = statistics.compare([_system("base", b=none), _system("other", b=seven)], 0)
    assert (row["p_holm"], row["n"], statistics.significance_label(row)) == (pytest.approx(2 / 128), 8, "significant")
    assert [statistics.significance_label(alone[task]) for task in "abc"] == [
        "not significant",
        "not significant",
        "no difference",
    ]


def test_each_system_is_compared_with_each_before_it():
    systems = [_system(name, a=[1.0, 0.0]) for name in ("base", "one", "one (2)")]
    rows = statistics.compare(systems, 0)
    assert [(row["from"], row["to"]) for row in rows] == [("base", "one"), ("base", "one (2)"), ("one", "one (2)")]
    assert {statistics.significance_label(row) for row in rows} == {"no difference"}
    assert {row["p_value"] for row in rows} == {1.0}
    # Not tested without values of documents.
    systems[1].scores.results["a"]["acc"].documents.clear()
    row = statistics.compare(systems[:2], 0)[0]
    assert (row["difference"], row["p_value"], row["significant"]) == (0, None, None)
    assert statistics.significance_label(row) == "no test"


def test_slopes_are_over_the_strengths_of_one_attribute():
    base = _system("base", t=[9.0, 9.0])
    a, b = SimpleNamespace(name="a"), SimpleNamespace(name="b")
    one = [_system("a", adapter=a, t=[1.0, 1.0]), _system("a, x", adapter=a, strengths={"x": 2.0}, t=[3.0, 0.0])]
    two = [_system("b", adapter=b, t=[9.0, 9.0])]
    two += [_system(f"b{s}", adapter=b, strengths={"y": 1.0, "x": s}, t=[s, 2 * s]) for s in (-1.0, 1.0)]
    first, second = statistics.strength_slopes([base, *one, *two])
    assert (first["system"], first["attribute"], first["slope"], first["negative"]) == ("a", "x", 0.25, 0.5)
    # With several attributes, the unsteered adapter is not on the line.
    assert (second["system"], second["attribute"], second["slope"]) == ("b", "x", 1.5)
    assert statistics.strength_slopes([base, one[0]]) == []
    assert {(row["rises"], row["falls"]) for row in statistics.compare([one[0], one[1]], 0)} == {(0.5, 0.5)}


def test_mcnemar_counts_only_the_documents_that_differ():
    a = [1.0] * 10 + [0.0] * 2 + [1.0] * 50 + [0.0] * 7
    b = [0.0] * 10 + [1.0] * 2 + [1.0] * 50 + [0.0] * 7
    assert statistics.mcnemar(a, b) == pytest.approx(2 * binom.cdf(2, 12, 0.5)) == pytest.approx(0.03857421875)
    assert statistics.mcnemar(b, a) == statistics.mcnemar(a, b)
    # 5 documents differ, all in one direction: 2 / 2^5.
    assert statistics.mcnemar([1.0] * 5, [0.0] * 5) == pytest.approx(0.0625)


def test_the_bootstrap_agrees_with_the_paired_t_test_on_many_documents():
    generator = np.random.default_rng(3)
    a = generator.normal(size=400)
    b = a + generator.normal(0.08, 1.0, size=400)
    expected = ttest_rel(a, b).pvalue
    assert 0.01 < expected < 0.5
    assert statistics.paired_bootstrap(a, b) == pytest.approx(expected, abs=0.02)
    assert statistics.paired_bootstrap(a, b, seed=1) == statistics.paired_bootstrap(a, b, seed=1)


def test_with_weights_the_bootstrap_is_of_a_ratio():
    # One long document determines the ratio, against all short ones.
    a, b = [0.0] * 9, [1.0] * 8 + [-1000.0]
    assert statistics.paired_bootstrap(a, b) > 0.3
    units = [1.0] * 8 + [1e4]
    systems = _system("a", t=a), _system("b", t=b)
    for system in systems:
        system.scores.results["t"]["acc"].units = dict(enumerate(units))
    assert (
        statistics.compare(systems, 0)[0]["p_value"]
        == statistics.paired_bootstrap(a, b, units)
        != statistics.paired_bootstrap(a, b)
    )
    assert statistics.paired_bootstrap(a, [2.0] * 9, [1.0] * 9) < 0.005


def test_few_documents_are_never_significant():
    assert statistics.paired_bootstrap([0.0, 0.0, 0.0], [1.0, 1.01, 0.99]) == 0.25
    assert statistics.paired_bootstrap([0.0], [1.0]) == statistics.paired_bootstrap([0.3, 0.2], [0.3, 0.2]) == 1.0


def test_documents_are_matched_by_id():
    systems = _system("a", t=[1.0] * 5), _system("b", t=[0.0])
    systems[1].scores.results["t"]["acc"].documents = {4: 0.0, 3: 0.0, 2: 0.0, 1: 0.0, 0: 0.0, 99: 1.0}
    assert statistics.compare(systems, 0)[0]["p_value"] == pytest.approx(0.0625)
    assert statistics.p_value([], [], None, 0) is None
    assert statistics.p_value([math.nan], [0.5], None, 0) is None
