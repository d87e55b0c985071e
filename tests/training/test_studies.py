"""The studies run, go on where they stopped, and rank answers as whole likelihoods do."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

from braces_cli.core.models.load_options import LoadOptions
from braces_cli.core.models.tokenization import encode
from braces_cli.core.session import open_session
from braces_cli.data.readers import Source
from braces_cli.data.row_formats import instruction_prompt
from braces_cli.scoring.likelihood import likelihoods

STUDIES = Path(__file__).parents[2] / "recipes" / "studies"
ROWS = [
    {
        "instruction": f"the {word}? Answer1: a film Answer2: a day Answer3: a town\n\nformat: answer1/answer2/answer3",
        "output": f"the answer is answer{1 + place % 3}",
        "answer": f"answer{1 + place % 3}",
    }
    for place, word in enumerate(["good end", "old town", "sad day", "happy film", "end"] * 4)
]


@pytest.fixture
def study(monkeypatch, capsys):
    """Run a study in this process and return what it printed."""

    def call(name: str, *args: object) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, args)])
        monkeypatch.syspath_prepend(str(STUDIES))
        capsys.readouterr()
        runpy.run_path(str(STUDIES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return call


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def test_defaults_runs_every_point_once(study, model_dir, rows, tmp_path):
    """Two points and one seed make two lines; a second call makes none."""
    out = tmp_path / "runs.jsonl"
    options = ("--model", model_dir, "--data", rows, "--eval-data", rows, "--out", out, "--steps", 1, "--seeds", 0)
    table = study("defaults", *options, "--grid", "scale=paper,auto", "--grid", "lr=0.01", "--max-length", 128)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(line["scale"], line["lr"], line["seed"]) for line in lines] == [("paper", 0.01, 0), ("auto", 0.01, 0)]
    assert table.count("n=1") == 2
    study("defaults", *options, "--grid", "scale=auto", "--grid", "lr=0.01", "--max-length", 128)
    assert len(out.read_text().splitlines()) == 2


def test_versus_compares_both_methods_at_their_best_rate(study, model_dir, rows, tmp_path):
    """The best of three rates, all seeds at it, accuracy beside chance."""
    options = ("--model", model_dir, "--data", rows, "--name", "rows", "--out", tmp_path / "runs.jsonl")
    printed = study("versus_lora", *options, "--steps", 1, "--seeds", "0,1", "--max-length", 128)
    report = json.loads(printed[printed.index("\n{\n") :])
    assert (report["rows"], report["held_out"]) == (18, 2)
    for method in ("braces", "lora"):
        found = report[method]
        assert len(found["losses"]) == 2
        assert found["loss_of_rates"][str(found["lr"])] == min(found["loss_of_rates"].values()) == found["losses"][0]
        assert found["accuracies"][0]["chance"] == pytest.approx(1 / 3)
    assert report["winner"] in ("braces", "lora")


def test_accuracy_ranks_answers_as_their_whole_likelihoods_do(model_dir, monkeypatch):
    """One pass over what the choices share, against one pass for each choice."""
    monkeypatch.syspath_prepend(str(STUDIES))
    accuracy = runpy.run_path(str(STUDIES / "versus_lora.py"))["accuracy"]
    session = open_session(str(model_dir), None, LoadOptions(device="cpu"))
    tokenizer = session.base.tokenizer
    hits = 0
    for row in ROWS:
        prompt = instruction_prompt(row["instruction"])
        choices = [encode(tokenizer, prompt, f"the answer is answer{k}") for k in (1, 2, 3)]
        losses = [one.nll for one in likelihoods(session.base.model, choices, tokenizer.pad_token_id, 4)]
        hits += losses.index(min(losses)) == int(row["answer"][-1]) - 1
    found = accuracy(session, [Source(row, "") for row in ROWS])
    assert found["value"] == pytest.approx(hits / len(ROWS))
    assert 0 < found["value"] < 1  # or it would tell nothing
    assert found["low"] < found["value"] < found["high"]
