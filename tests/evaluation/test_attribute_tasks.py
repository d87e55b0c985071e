"""The tasks `answers` and `detection`, the worst of several samples, and slopes over the strength."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest

from braces_cli.core.attributes.hooks import steered
from braces_cli.core.attributes.lookup import find_attribute
from braces_cli.core.errors import ConfigError, DataError
from braces_cli.core.options import LoadOptions
from braces_cli.evaluation.native_tasks import AnswerPair, detection, log_odds
from braces_cli.evaluation.results import Metric, Scores
from braces_cli.evaluation.run import run_evaluation
from braces_cli.evaluation.settings import EvalSettings
from braces_cli.evaluation.statistics import compare, strength_slopes
from braces_cli.evaluation.systems import System
from braces_cli.evaluation.tables import slope_table
from braces_cli.scoring.scorers import ToxicWords

CPU = LoadOptions(device="cpu")
PAIRS = [{"prompt": f"the film {i} is", "positive": " good", "negative": " sad"} for i in range(5)]


def test_answers_shift_with_the_strength(model_dir, session, write_jsonl):
    """Preferences are those of the model as each system steers it; slopes are over the same documents."""
    data = (f"answers={write_jsonl('answers.jsonl', PAIRS)}",)
    settings = EvalSettings(tasks=("answers",), task_data=data, attribute=("positive",), s=("-20,20",))
    result = run_evaluation(str(model_dir), [], CPU, settings)
    positive = find_attribute(session, "positive", None)
    pairs = [AnswerPair(**row) for row in PAIRS]
    lines = []
    for system, s in zip(result["systems"], (0.0, -20.0, 20.0), strict=True):
        with steered(session, [(positive, s)]):
            odds = log_odds(session, pairs, 8)
        entry = system["results"]["answers"]["log_odds"]
        assert entry["value"] == pytest.approx(np.mean(odds), abs=1e-4)
        assert entry["stderr"] == pytest.approx(np.std(odds, ddof=1) / 5**0.5, abs=1e-4)
        lines.append(odds)
    expected = np.polyfit([0, -20, 20], np.array(lines), 1)[0]
    found = next(row for row in result["slopes"] if row["metric"] == "log_odds")
    assert found["slope"] == pytest.approx(expected.mean(), abs=1e-5)
    assert (found["system"], found["attribute"], found["n"]) == ("base", "positive", 5)
    assert len(slope_table(result)[1]) == 3
    row = next(row for row in result["comparisons"] if (row["metric"], row["to"]) == ("log_odds", "base, positive +20"))
    moves = np.array(lines[2]) - np.array(lines[0])
    assert (row["rises"], row["falls"]) == pytest.approx(((moves > 0).mean(), (moves < 0).mean()))
    assert row["rises_interval"][0] <= row["rises"] <= row["rises_interval"][1]


def test_detection_is_the_same_at_every_strength(model_dir, session, write_jsonl):
    texts = [("the film is good", "Positive"), ("a day", "other"), ("happy", "positive"), ("old", "other")] * 2
    file = write_jsonl("rows.jsonl", [{"text": text, "label": label} for text, label in texts])
    settings = EvalSettings(tasks=("detection",), task_data=(f"detection={file}",), attribute=("positive",), s=("20",))
    result = run_evaluation(str(model_dir), [], CPU, settings)
    expected = detection(session, find_attribute(session, "positive", None), texts, "positive", "rows")
    for system in result["systems"]:
        assert system["results"]["detection"]["auroc"] == {
            "value": expected["auroc"], "stderr": expected["auroc_stderr"], "n": 4
        }  # fmt: skip
    other = EvalSettings(tasks=("detection",), task_data=(f"detection={file}",), attribute=("toxic",))
    with pytest.raises(DataError, match="0 texts are `toxic` and 8 are not"):
        run_evaluation(str(model_dir), [], CPU, other)
    with pytest.raises(ConfigError, match="detection needs one attribute, not 0"):
        run_evaluation("nowhere", [], CPU, EvalSettings(tasks=("detection",), task_data=(f"detection={file}",)))


def test_toxicity_is_that_of_the_worst_of_25_samples(braces, model_dir, tmp_path, monkeypatch):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("the film is\na day\n")
    # The tiny model writes no word of the list; with these there is something to find.
    monkeypatch.setattr(ToxicWords, "_listed", lambda self, word: "e" in word)
    out = tmp_path / "out"
    base = ["eval", "--model", model_dir, "--device", "cpu", "--max-new-tokens", 6, "--format", "json"]
    outcome = braces(*base, "--tasks", "toxicity", "--task-data", f"toxicity={prompts}", "--output-dir", out,
                     "--log-samples")  # fmt: skip
    assert outcome.code == 0, outcome.err
    rows = [json.loads(line) for line in (out / "samples" / "base" / "toxicity.jsonl").read_text().splitlines()]
    assert [len(row["answer"]) for row in rows] == [25, 25]
    text_scores = [ToxicWords().score(row["answer"], "toxic") for row in rows]
    found = outcome.json["systems"][0]["results"]["toxicity"]
    expected = np.mean([max(each.value for each in group) for group in text_scores])
    assert found["expected_max_toxicity"]["value"] == pytest.approx(expected)
    assert found["toxicity_probability"]["value"] == np.mean([any(each.has for each in group) for group in text_scores])
    assert found["toxic"]["value"] == pytest.approx(np.mean([each.has for group in text_scores for each in group]))
    assert outcome.json["settings"]["generation"]["num_samples"] == {"sentiment": 1, "toxicity": 25}


def test_a_judge_model_rates_what_a_task_generates(model_dir, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("the film is\na day\n")
    settings = EvalSettings(
        tasks=("sentiment",), task_data=(f"sentiment={prompts}",), scorer=(f"sentiment=judge:{model_dir}",),
        max_new_tokens=6,
    )  # fmt: skip
    found = run_evaluation(str(model_dir), [], CPU, settings)["systems"][0]["results"]["sentiment"]
    assert all(0 <= found[name]["value"] <= 2 for name in ("concept", "relevance", "fluency", "overall"))


def _system(name, strengths, values, adapter=None):
    scores = Scores({"t": {"m": Metric(sum(values) / len(values), None, len(values), dict(enumerate(values)))}})
    terms = [(SimpleNamespace(name=each), s) for each, s in strengths.items()]
    return System(name, adapter, terms, scores)


def test_slopes_are_of_one_adapter_and_one_attribute():
    base = _system("base", {}, [9.0, 9.0])
    a, b = SimpleNamespace(name="a"), SimpleNamespace(name="b")
    one = [_system("a", {}, [1.0, 1.0], a), _system("a, x", {"x": 2.0}, [3.0, 0.0], a)]
    two = [_system("b", {}, [9.0, 9.0], b), *(
        _system(f"b{s}", {"y": 1.0, "x": s}, [s, 2 * s], b) for s in (-1.0, 1.0)
    )]  # fmt: skip
    first, second = strength_slopes([base, *one, *two])
    assert (first["system"], first["attribute"], first["slope"], first["negative"]) == ("a", "x", 0.25, 0.5)
    # With another attribute on, the unsteered adapter is no point of the line.
    assert (second["system"], second["attribute"], second["slope"]) == ("b", "x", 1.5)
    assert strength_slopes([base, one[0]]) == []
    assert {(row["rises"], row["falls"]) for row in compare([one[0], one[1]], 0)} == {(0.5, 0.5)}
