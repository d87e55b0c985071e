"""The studies run, go on where they stopped, and rank answers as whole likelihoods do."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

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
    table = study("defaults", *options, "--grid", "relevance=paper,untied", "--grid", "lr=0.01", "--max-length", 128)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(line["relevance"], line["lr"], line["seed"]) for line in lines] == [
        ("paper", 0.01, 0),
        ("untied", 0.01, 0),
    ]
    assert table.count("n=1") == 2
    study("defaults", *options, "--grid", "relevance=untied", "--grid", "lr=0.01", "--max-length", 128)
    assert len(out.read_text().splitlines()) == 2


def test_versus_keeps_the_best_rate_and_reports_all_seeds(study, model_dir, rows, tmp_path):
    """Four rates on the first seed, the other seeds at the best; equal budgets; a table and a picture."""
    out = tmp_path / "runs.jsonl"
    options = ("--task", "rows", "--model", model_dir, "--data", rows, "--held-out", rows, "--out", out, "--steps", 1)
    study("versus_lora", *options, "--seeds", "0,1", "--systems", "untied-1/4,lora-4", "--max-length", 128)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["system"] for line in lines] == ["untied-1/4"] * 5 + ["lora-4"] * 5
    for system in (lines[:5], lines[5:]):
        best = min(system[:4], key=lambda line: line["validation"])
        assert (system[4]["lr"], system[4]["seed"]) == (best["lr"], 1)
    assert lines[0]["parameters"] <= lines[5]["parameters"]  # a quarter of rank 16 is rank 4
    picture = tmp_path / "versus.png"
    table = study("versus_lora", "--report", "--out", out, "--plot", picture)
    assert table.count("| rows |") == 2
    assert picture.read_bytes().startswith(b"\x89PNG")
