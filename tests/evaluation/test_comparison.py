"""Differences, their correction for many tasks, and thresholds that a result must reach."""

from __future__ import annotations

import math

import pytest
from scipy.stats import binom, ttest_rel

from braces_cli.core.errors import ConfigError
from braces_cli.evaluation import catalog
from braces_cli.evaluation.results import AVERAGE, Metric, Scores, slug
from braces_cli.evaluation.run import check_reached, check_settings
from braces_cli.evaluation.settings import EvalSettings, Threshold, parse_thresholds
from braces_cli.evaluation.statistics import (
    compare,
    holm,
    mcnemar,
    p_value,
    paired_bootstrap,
    significance_label,
)
from braces_cli.evaluation.systems import System


def test_holm_by_hand():
    # Sorted: 0.01 * 4, 0.02 * 3, 0.03 * 2, 0.04 * 1, none below the one before.
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def _system(name: str, **tasks: list[float]) -> System:
    """A system with one metric of 0 and 1 for each task."""
    scores = Scores()
    for task, values in tasks.items():
        scores.results[task] = {"acc": Metric(sum(values) / len(values), None, len(values), dict(enumerate(values)))}
    return System(name, scores=scores)


def test_p_is_corrected_for_the_number_of_tasks():
    none, six, seven = [0.0] * 8, [1.0] * 6 + [0.0] * 2, [1.0] * 7 + [0.0]
    base, other = _system("base", a=none, b=none, c=none), _system("other", a=six, b=seven, c=none)
    rows = {row["task"]: row for row in compare([base, other], 0)}
    assert {task: row["p_value"] for task, row in rows.items()} == pytest.approx({"a": 2 / 64, "b": 2 / 128, "c": 1.0})
    corrected = {"a": 2 / 64 * 2, "b": 2 / 128 * 3, "c": 1.0}
    assert {task: row["p_holm"] for task, row in rows.items()} == pytest.approx(corrected)
    assert [task for task, row in rows.items() if row["significant"]] == ["b"]
    assert [significance_label(rows[task]) for task in "abc"] == ["not significant", "significant", "no difference"]
    assert {row["n"] for row in rows.values()} == {8}


def test_each_system_is_held_against_each_before_it():
    systems = [_system(name, a=[1.0, 0.0]) for name in ("base", "one", "one (2)")]
    rows = compare(systems, 0)
    assert [(row["from"], row["to"]) for row in rows] == [("base", "one"), ("base", "one (2)"), ("one", "one (2)")]
    assert {significance_label(row) for row in rows} == {"no difference"}


def test_a_difference_without_scores_of_documents_is_not_tested():
    one, other = _system("base", a=[1.0]), _system("other", a=[0.0])
    other.scores.results["a"]["acc"].documents.clear()
    (row,) = compare([one, other], 0)
    assert (row["difference"], row["p_value"], row["significant"], significance_label(row)) == (
        -1.0,
        None,
        None,
        "no test",
    )


def test_the_average_is_the_plain_mean_over_tasks():
    scores = Scores()
    members = catalog.GROUPS["zero_shot"]
    for place, task in enumerate(members):
        scores.results[task] = {"acc": Metric(place / 10, 0.3, place + 1), "other": Metric(9.0, None, 1)}
    scores.add_averages(catalog.Selection(groups={"zero_shot": list(members)}).averaged)
    (average,) = scores.results["zero_shot"].values()
    expected = {"value": pytest.approx(0.2), "stderr": pytest.approx(0.3 / math.sqrt(5)), "n": 15}
    assert (list(scores.results["zero_shot"]), average.to_json()) == ([AVERAGE], expected)


def test_thresholds_are_told_apart_from_the_right():
    assert parse_thresholds(["popqa:acc=0.5", "a:b=c:acc_word=-1e-1"]) == [
        Threshold("popqa", "acc", 0.5),
        Threshold("a:b=c", "acc_word", -0.1),
    ]


@pytest.mark.parametrize(
    "value", ["popqa", "popqa=0.5", "popqa:acc", "popqa:acc=high", ":acc=1", "popqa:=1", "a:b=nan"]
)
def test_a_threshold_of_another_form_is_a_wrong_call(value):
    with pytest.raises(ConfigError, match="TASK:METRIC=VALUE"):
        parse_thresholds([value])


def test_a_threshold_must_be_for_a_task_that_is_measured():
    check_settings(EvalSettings(tasks=["zero_shot"], fail_under=["popqa:acc=0", "zero_shot:braces_average=0"]))
    with pytest.raises(ConfigError, match="not evaluated") as caught:
        check_settings(EvalSettings(tasks=["popqa"], fail_under=["popqua:acc=0.5"]))
    assert "Did you mean popqa?" in str(caught.value)


def test_better_is_more_or_less_as_the_metric_goes():
    def system(name, adapter, acc, ppl):
        metrics = {"t": {"acc": {"value": acc}}, "p": {"ppl": {"value": ppl}}}
        return {"name": name, "adapter": adapter, "results": metrics}

    systems = [system("base", None, 0.9, 9.0), system("a", "a", 0.5, 20.0), system("b", "b", 0.4, math.nan)]
    result = {"systems": systems, "settings": {"higher_is_better": {"t": {"acc": True}, "p": {"ppl": False}}}}
    thresholds = parse_thresholds(["t:acc=0.5", "p:ppl=20", "t:none=0"])
    reached = [(row["system"], row["metric"], row["reached"]) for row in check_reached(thresholds, result)]
    assert reached == [
        ("a", "acc", True), ("b", "acc", False), ("a", "ppl", True), ("b", "ppl", False), ("a", "none", False),
        ("b", "none", False),
    ]  # fmt: skip
    # The base is judged where there is nothing else.
    alone = check_reached(thresholds, {**result, "systems": systems[:1]})
    assert [(row["system"], row["reached"]) for row in alone] == [("base", True), ("base", True), ("base", False)]


def test_each_name_has_a_file_name_of_its_own():
    names = ["base", "a/b", "a_b", "../up", "x" * 200, "x" * 201, "ü"]
    slugs = [slug(name) for name in names]
    assert len(set(slugs)) == len(names)
    assert all("/" not in each and not each.startswith(".") and len(each) < 100 for each in slugs)
    assert slugs[0] == "base"


def test_what_is_not_finite_is_shown_and_drawn_all_the_same(tmp_path):
    from braces_cli.core.files import finite
    from braces_cli.evaluation import tables

    one, other = _system("base", a=[1.0, 0.0]), _system("other", a=[0.0, 0.0])
    for system, value in ((one, math.inf), (other, 3.0)):
        system.scores.results["p"] = {"ppl": Metric(value, None, 2)}
    systems = [
        {
            "name": s.name,
            "model": "m",
            "adapter": None,
            "method": None,
            "sha256": None,
            "results": {
                task: {name: metric.to_json() for name, metric in metrics.items()}
                for task, metrics in s.scores.results.items()
            },
        }
        for s in (one, other)
    ]
    keys = ("revision", "fingerprint", "dtype", "quantize", "limit", "apply_chat_template")
    names = ("num_fewshot_used", "task_versions", "task_data_sha256", "seeds", "versions")
    settings = {**dict.fromkeys(keys), **{key: {} for key in names}, "tokenizer": {"chat_template": None}}
    result = {"systems": systems, "comparisons": compare([one, other], 0)}
    result["settings"] = {**settings, "significance_level": 0.05}
    for each in (result, finite(result)):
        page = tables.markdown(each)
        assert "| p | ppl | 2 | other | 3 |" in page
        assert page.count("no test") == 1
        tables.draw(each, tmp_path / "p.png")
    assert "not finite" in page


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
