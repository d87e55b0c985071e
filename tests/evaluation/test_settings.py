"""Settings of `braces eval`: strengths, thresholds, values that are refused."""

import pytest

from braces_cli.core.config import build
from braces_cli.core.errors import ConfigError
from braces_cli.evaluation.settings import EvalSettings


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"attribute": ["positive"], "s": ["1", "2"]}, "2 strengths for 1 attributes"),
        ({"s": ["1"]}, "1 strengths for 0 attributes"),
        ({"attribute": ["positive", "toxic"], "s": ["1,2", "1,2,3"]}, "lists of 2 and 3 strengths"),
        *(({"attribute": ["positive"], "s": [s]}, "is not FROM:TO:STEP") for s in ("much", "a:b:c", "nan")),
        ({"attribute": ["positive"], "s": ["4:-4:1"]}, "has no points"),
        ({"attribute": ["positive"], "s": ["0:1:1e-9"]}, "more than 200"),
        ({"attribute": ["positive", "positive"], "s": ["1", "2"]}, "named twice"),
        *(
            ({"fail_under": [value]}, "TASK:METRIC=VALUE")
            for value in ("popqa", "popqa=0.5", "popqa:acc", "popqa:acc=high", ":acc=1", "popqa:=1", "a:b=nan")
        ),
        *(({"batch_size": size}, "not a batch size") for size in (0, -1, "many")),
        ({"limit": 0}, "at least 1"),
        ({"resume": True}, "--resume: needs an output folder"),
        ({"log_samples": True}, "--log-samples: needs an output folder"),
    ],
)
def test_values_that_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        build(EvalSettings, {"tasks": "popqa", **values})


def test_points_combine_the_strengths_of_attributes():
    assert EvalSettings(attribute=("positive",)).points == [{"positive": 1.0}]
    assert EvalSettings().points == []
    both = EvalSettings(attribute=("positive", "sad"), s=("-1:1:1", "0.5"))
    assert both.points == [{"positive": s, "sad": 0.5} for s in (-1.0, 0.0, 1.0)]


def test_thresholds_are_parsed_from_the_right():
    assert EvalSettings(fail_under=("popqa:acc=0.5", "a:b=c:acc_word=-1e-1")).thresholds == [
        ("popqa", "acc", 0.5),
        ("a:b=c", "acc_word", -0.1),
    ]
