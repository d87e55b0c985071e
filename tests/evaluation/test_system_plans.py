"""Any task under steering: base, adapters and each of them steered, in one run."""

from __future__ import annotations

import json

import pytest

from braces_cli.core.config import build
from braces_cli.core.errors import ConfigError
from braces_cli.core.options import LoadOptions
from braces_cli.evaluation import lm_eval_runner
from braces_cli.evaluation import run as run_module
from braces_cli.evaluation.results import Store
from braces_cli.evaluation.run import run_evaluation
from braces_cli.evaluation.settings import EvalSettings
from braces_cli.evaluation.tables import main_table, markdown, pair_table

CPU = LoadOptions(device="cpu")
ARC = [
    {"question": f"Which is {i}?", "choices": {"text": [f"the {i}", "none", "all of it"], "label": list("ABC")},
     "answerKey": "ABC"[i % 3]} for i in range(6)
]  # fmt: skip


@pytest.fixture
def asked(write_jsonl, tmp_path):
    """Settings of an evaluation on a multiple-choice task of lm-eval's and a task of our own."""
    text = tmp_path / "t.txt"
    text.write_text("A first line.\nAnd a second, longer one.\nA third.\n")
    data = (f"arc_easy={write_jsonl('arc.jsonl', ARC)}", f"perplexity={text}")

    def make(**more) -> EvalSettings:
        return EvalSettings(tasks=("arc_easy,perplexity",), task_data=data, **more)

    return make


STEERED = {"attribute": ("positive",), "s": ("-20,0,20",)}


def test_strength_zero_is_no_attribute_and_others_are_not(tiny_folder, asked, tmp_path):
    """Bit for bit, document by document, in the log of samples too."""
    store = Store(tmp_path / "out", log_samples=True)
    result = run_evaluation(str(tiny_folder), [], CPU, asked(**STEERED), store=store)
    names = ["base", "base, positive -20", "base, positive +0", "base, positive +20"]
    assert [system["name"] for system in result["systems"]] == names
    assert [system["attributes"] for system in result["systems"]] == [{}, *({"positive": s} for s in (-20, 0, 20))]
    assert {system["adapter"] for system in result["systems"]} == {None}
    bare, low, zero, high = (system["results"] for system in result["systems"])
    assert zero == bare
    assert len({each["perplexity"]["bits_per_byte"]["value"] for each in (bare, low, high)}) == 3
    logs = {}
    for folder in (store.folder / "samples").iterdir():
        rows = [json.loads(line) for task in sorted(folder.iterdir()) for line in task.read_text().splitlines()]
        logs[rows[0]["system"]] = [{**row, "system": ""} for row in rows]
    assert logs["base, positive +0"] == logs["base"] != logs["base, positive +20"]
    assert {(row["from"], row["to"]) for row in result["comparisons"]} == {("base", name) for name in names[1:]}
    for row in result["comparisons"]:
        assert 0 < row["p_value"] <= 1
        assert (row["p_value"] == 1 and row["difference"] == 0) or row["to"] != "base, positive +0"
    columns, rows = main_table(result)
    assert [row[columns.index("system")] for row in rows[:4]] == names
    assert "steered by: positive" in markdown(result)
    assert result["settings"]["attributes"] == {"positive": [-20.0, 0.0, 20.0]}


def test_each_adapter_stands_beside_itself_steered(tiny_folder, make_adapter, asked):
    """The base is not steered where there are adapters; strengths are not compared with each other."""
    adapter = str(make_adapter(tiny_folder))
    result = run_evaluation(None, [adapter], CPU, asked(attribute=("positive", "toxic"), s=("-2,2", "1")))
    low, high = "seed0, positive -2 toxic +1", "seed0, positive +2 toxic +1"
    assert [system["name"] for system in result["systems"]] == ["base", "seed0", low, high]
    assert [system["adapter"] for system in result["systems"]] == [None, adapter, adapter, adapter]
    pairs = {(row["from"], row["to"]) for row in result["comparisons"]}
    assert pairs == {("base", "seed0"), ("base", low), ("base", high), ("seed0", low), ("seed0", high)}
    assert {tuple(row[2:4]) for row in pair_table(result)[1]} == {("seed0", low), ("seed0", high)}
    plain = run_evaluation(None, [adapter], CPU, asked())
    assert [system["results"] for system in plain["systems"]] == [each["results"] for each in result["systems"][:2]]


def test_a_steered_run_is_continued_and_one_of_other_strengths_is_not(tiny_folder, asked, tmp_path, monkeypatch):
    store = Store(tmp_path / "out")
    measure = run_module._measure
    monkeypatch.setattr(run_module, "_measure", _until("base, positive +20", measure))
    with pytest.raises(KeyboardInterrupt):
        run_evaluation(str(tiny_folder), [], CPU, asked(**STEERED), store=store)
    measured: list[str] = []
    score = lm_eval_runner.measure
    monkeypatch.setattr(run_module, "_measure", measure)
    monkeypatch.setattr(lm_eval_runner, "measure", lambda *a: measured.append(a[-1]) or score(*a))
    resumed = run_evaluation(str(tiny_folder), [], CPU, asked(**STEERED), store=store, resume=True)
    assert measured == ["base, positive +20, arc_easy"]
    assert resumed["systems"] == run_evaluation(str(tiny_folder), [], CPU, asked(**STEERED))["systems"]
    with pytest.raises(ConfigError, match=r"has other settings \(steering"):
        run_evaluation(
            str(tiny_folder), [], CPU, asked(attribute=("positive",), s=("-20,20",)), store=store, resume=True
        )


def _until(label, measure):
    def interrupted(system, *args):
        if system.name == label:
            raise KeyboardInterrupt
        return measure(system, *args)

    return interrupted


def test_thresholds_hold_for_what_is_steered(tiny_folder, asked):
    settings = asked(no_base=True, fail_under=("perplexity:token_perplexity=1e9",), **STEERED)
    result = run_evaluation(str(tiny_folder), [], CPU, settings)
    assert [row["system"] for row in result["fail_under"]] == [f"base, positive {s}" for s in ("-20", "+0", "+20")]
    assert all(row["reached"] for row in result["fail_under"])


def test_an_unknown_attribute_fails_before_anything_is_measured(tiny_folder, asked, monkeypatch):
    monkeypatch.setattr(run_module, "_measure", lambda *a: pytest.fail("measured"))
    with pytest.raises(ConfigError, match="unknown attribute `positve`"):
        run_evaluation(str(tiny_folder), [], CPU, asked(attribute=("positve",)))


@pytest.mark.parametrize(
    ("names", "values", "message"),
    [
        (("positive",), ("1", "2"), "2 strengths for 1 attributes"),
        ((), ("1",), "1 strengths for 0 attributes"),
        (("positive", "toxic"), ("1,2", "1,2,3"), "lists of 2 and 3 strengths"),
        (("positive",), ("much",), "is not FROM:TO:STEP"),
        (("positive", "positive"), ("1", "2"), "named twice"),
    ],
)
def test_strengths_that_do_not_fit(names, values, message):
    with pytest.raises(ConfigError, match=message):
        build(EvalSettings, {"attribute": names, "s": values, "tasks": "popqa"})


def test_points():
    assert EvalSettings(attribute=("positive",)).points == [{"positive": 1.0}]
    assert EvalSettings().points == []
    both = EvalSettings(attribute=("positive", "sad"), s=("-1:1:1", "0.5"))
    assert both.points == [{"positive": s, "sad": 0.5} for s in (-1.0, 0.0, 1.0)]
