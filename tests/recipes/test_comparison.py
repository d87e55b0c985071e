"""Search of rates, style of the chats and tables of the comparison, without a model."""

import importlib
from pathlib import Path
from typing import Any

import pytest

STUDIES = Path(__file__).parents[2] / "recipes" / "studies"
RUN = {"model": "m", "task": "sst5-text", "steps": 120, "batch": 16, "n": 500, "parameters": 230400}


@pytest.fixture
def comparison(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(STUDIES))
    return importlib.import_module("comparison")


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(STUDIES))
    return importlib.import_module("tasks")


@pytest.mark.parametrize(
    ("best", "tried"),
    [
        (0.01, [0.005, 0.01, 0.02]),
        (0.04, [0.005, 0.01, 0.02, 0.04, 0.08]),
        (0.0025, [0.005, 0.01, 0.02, 0.0025, 0.00125]),
    ],
)
def test_grid_is_extended_while_the_best_rate_is_at_its_border(comparison: Any, best: float, tried: list) -> None:
    seen = []

    def loss_of(rate: float) -> float | None:
        seen.append(rate)
        return None if rate > 0.05 else abs(rate - best)  # None: training diverges

    assert comparison.best_rate(loss_of, 0.01, 4) == best
    assert seen == tried


@pytest.mark.parametrize(
    ("answer", "broken"),
    [
        ("about: kite, drum\n1) a.\n2) b.\nyou are welcome.", {"names"}),
        ("about: drum, kite\n1) a.\nyou are welcome.", {"numbers"}),
        ("about: drum, kite\n1) A.\n2) b.\nyou are welcome.", {"lower"}),
        ("about: drum, kite\n1) a.\n2) b.", {"numbers", "thanks"}),
        ("", {"names", "numbers", "thanks"}),
    ],
)
def test_rules_find_broken_answers(tasks: Any, answer: str, broken: set[str]) -> None:
    found = tasks.rules(answer, tasks.Question("How? Thank you!", ("kite", "drum"), True))
    assert {name for name, followed in found.items() if not followed} == broken


def test_table_has_mean_and_range_of_each_system(comparison: Any) -> None:
    runs = [{**RUN, "part": "base", "loss": 5.012}]
    runs += [{**RUN, "part": "tune", "system": "lora-qv-4", "rate": 0.003, "seed": 0, "loss": 1.0}]
    runs += [
        {**RUN, "part": "report", "system": "lora-qv-4", "rate": 0.003, "seed": seed, "loss": loss}
        for seed, loss in enumerate((4.15, 4.16, 4.17))
    ]
    runs += [{**RUN, "part": "report", "system": "lora-qv-16", "rate": 0.1, "seed": 0, "loss": None, "diverged": True}]
    lines = comparison.tables(runs).splitlines()
    assert lines[0] == "### SST-5, text (m)"
    assert lines[4:] == [
        "| base |  |  | 5.012 |  | 500 |",
        "| LoRA r 4 (q, v) | 230,400 | 0.003 | 4.160 (4.150 to 4.170) | 3 | 500 |",
        "| LoRA r 16 (q, v) | 230,400 | 0.1 | diverged | 1 | 500 |",
    ]


def test_zero_shot_table_corrects_the_p_values_of_a_pair(comparison: Any) -> None:
    lora, braces = "lora-qv-16, boolq", "braces-input-16, boolq"
    results = {name: {"popqa": 0.1 + k / 10, "triviaqa": 0.2} for k, name in enumerate(("base", lora, braces))}
    names = {"base": "base", lora: "out-0", braces: "out-1"}
    measured = (
        ("base", lora, "popqa", 0.1, 0.02), ("base", lora, "triviaqa", 0.0, 1.0),
        ("base", braces, "popqa", 0.2, 0.01), ("base", braces, "triviaqa", 0.0, 0.03),
        (lora, braces, "popqa", 0.1, 0.5), (lora, braces, "triviaqa", 0.0, 1.0),
    )  # fmt: skip
    document = {
        "systems": [
            {"name": names[name], "results": {task: {"acc": {"value": value}} for task, value in scores.items()}}
            for name, scores in results.items()
        ],
        "comparisons": [
            {"task": task, "metric": metric, "from": names[one], "to": names[other], "difference": d, "p_value": p}
            for one, other, task, d, p in measured
            for metric in ("acc", "acc_word")
        ],
    }
    found = comparison.evaluated(document, list(names))
    assert found["results"] == results
    runs = [{"model": "m", "part": "zero-shot", "task": "boolq", **found}]
    assert comparison.tables(runs).splitlines()[2:] == [
        "| system | trained on | PopQA | TriviaQA |",
        "| --- | --- | ---: | ---: |",
        "| base |  | 10.0 | 20.0 |",
        "| LoRA r 16 (q, v) | boolq | 20.0 (p = 0.04) | 20.0 (p = 1) |",
        "| braces, rank 16, relevance to input | boolq | 30.0 (p = 0.02) | 20.0 (p = 0.03) |",
        "| braces, rank 16, relevance to input minus LoRA r 16 (q, v) | boolq | +10.0 (p = 1) | +0.0 (p = 1) |",
    ]
