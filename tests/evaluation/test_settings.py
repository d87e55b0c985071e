"""Settings of `braces eval`: strengths, thresholds, values that are refused."""

from __future__ import annotations

import pytest

from braces_cli.core.config import build
from braces_cli.core.errors import ConfigError
from braces_cli.evaluation.settings import EvalSettings, Threshold, parse_thresholds


@pytest.mark.parametrize(
    ("names", "values", "message"),
    [
        (("positive",), ("1", "2"), "2 strengths for 1 attributes"),
        ((), ("1",), "1 strengths for 0 attributes"),
        (("positive", "toxic"), ("1,2", "1,2,3"), "lists of 2 and 3 strengths"),
        *((("positive",), (s,), "is not FROM:TO:STEP") for s in ("much", "a:b:c", "nan")),
        (("positive",), ("4:-4:1",), "has no points"),
        (("positive",), ("0:1:1e-9",), "more than 200"),
        (("positive", "positive"), ("1", "2"), "named twice"),
    ],
)
def test_strengths_that_do_not_fit_the_attributes(names, values, message):
    with pytest.raises(ConfigError, match=message):
        build(EvalSettings, {"attribute": names, "s": values, "tasks": "popqa"})


def test_points_combine_the_strengths_of_attributes():
    assert EvalSettings(attribute=("positive",)).points == [{"positive": 1.0}]
    assert EvalSettings().points == []
    both = EvalSettings(attribute=("positive", "sad"), s=("-1:1:1", "0.5"))
    assert both.points == [{"positive": s, "sad": 0.5} for s in (-1.0, 0.0, 1.0)]


def test_thresholds_are_parsed_from_the_right():
    assert parse_thresholds(["popqa:acc=0.5", "a:b=c:acc_word=-1e-1"]) == [
        Threshold("popqa", "acc", 0.5),
        Threshold("a:b=c", "acc_word", -0.1),
    ]


@pytest.mark.parametrize(
    "value", ["popqa", "popqa=0.5", "popqa:acc", "popqa:acc=high", ":acc=1", "popqa:=1", "a:b=nan"]
)
def test_a_threshold_of_another_form_is_refused(value):
    with pytest.raises(ConfigError, match="TASK:METRIC=VALUE"):
        parse_thresholds([value])


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"batch_size": 0}, "not a batch size"),
        ({"batch_size": -1}, "not a batch size"),
        ({"batch_size": "many"}, "not a batch size"),
        ({"limit": 0}, "at least 1"),
        ({"resume": True}, "--resume: needs an output folder"),
        ({"log_samples": True}, "--log-samples: needs an output folder"),
    ],
)
def test_values_that_are_refused(values, words):
    with pytest.raises(ConfigError, match=words):
        build(EvalSettings, {"tasks": "popqa", **values})
