"""The study of attributes from descriptions runs on a tiny model, goes on where it stopped, and interpolates right."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

STUDIES = Path(__file__).parents[2] / "recipes" / "studies"


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(str(STUDIES))
    return str(STUDIES / "attributes_from_descriptions.py")


def test_every_side_is_one_line_and_none_is_measured_twice(study, model_dir, monkeypatch, tmp_path, capsys):
    """Unsteered once; a picture; the second call only reads."""
    out, plot = tmp_path / "runs.jsonl", tmp_path / "effects.png"
    argv = [study, "--model", model_dir, "--openings", "--count", 2, "--tokens", 2, "--seeds", 0, "--out", out]
    argv += ["--attributes", "food", "--methods", "words,pca", "--plot", plot]
    monkeypatch.setattr(sys, "argv", [str(each) for each in argv])
    for _ in range(2):
        runpy.run_path(study, run_name="__main__")
        lines = [json.loads(line) for line in out.read_text().splitlines()]
        assert [(line["method"], line.get("side")) for line in lines] == [
            ("unsteered", None), ("words", 1), ("words", -1), ("pca", 1), ("pca", -1),
        ]  # fmt: skip
    assert plot.stat().st_size > 1000
    assert "food words: " in capsys.readouterr().out


def test_shares_are_compared_at_no_more_than_one_perplexity(study):
    """Halfway in the log of the ratio; a weaker push that moves further counts, one that costs too much does not."""
    within = runpy.run_path(study)["within_ratio"]
    assert within([(0.0, 1.0, 0.2), (2.0, 2.25, 0.6)], 1) == pytest.approx(0.4)
    assert within([(0.0, 1.0, 0.5), (4.0, 1.4, 0.3), (2.0, 1.1, 0.1)], -1) == 0.1
    assert within([(0.0, 1.0, 0.5), (2.0, 1.1, 0.4)], 1) == 0.5


def test_the_rules_tell_the_sides_apart(study):
    """One clear text of each side."""
    judges = runpy.run_path(study)["JUDGES"]
    clear = {
        "mood": ("What a lovely, wonderful day.", "A horrible and sad day."),
        "tense": ("She walked home and was tired.", "She will go home and is tired."),
        "person": ("I gave my dog to me.", "He gave his dog to her."),
        "formality": ("The committee submitted considerable documentation.", "So yeah we go on and on."),
        "food": ("They ate bread for dinner.", "They went up the hill."),
        "question": ("Where is it?", "It is here."),
    }
    assert judges.keys() == clear.keys()
    for name, (one, other) in clear.items():
        assert judges[name](one)
        assert not judges[name](other)
