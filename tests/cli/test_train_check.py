"""`braces train`: checks of data and settings, and the plan of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Texts with attributes and strengths."""
    path = tmp_path / "rows.jsonl"
    moods = [("good", "positive", 2), ("sad", "negative", 1), ("fine", "positive", 1), ("old", "neutral", 0)]
    lines = [{"text": f"the {word} film", "mood": mood, "score": score} for word, mood, score in moods]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_an_unknown_strength_field_is_refused(braces: Any, model_dir: Path, rows: Path) -> None:
    """With a similar name; also in a stream."""
    call = ("train", "--model", model_dir, "--data", rows, "--attribute-field", "mood")
    for more in (["--check"], ["--streaming", "--max-steps", 1, "--output-dir", rows.parent / "out"]):
        outcome = braces(*call, "--strength-field", "scroe", *more)
        assert outcome.code == 3, outcome.err
        assert "no row has a strength `scroe`" in outcome.err
        assert "Did you mean score?" in outcome.err
    assert braces(*call, "--check").code == 0  # without the option, rows need no strength


def test_check_reports_strengths_by_attribute(braces: Any, model_dir: Path, rows: Path) -> None:
    call = ("train", "--model", model_dir, "--data", rows, "--columns", "attribute=mood,strength=score,text=text")
    strengths = braces(*call, "--check", "--format", "json").json["data"]["strengths"]
    assert strengths["positive"] == {"least": 1.0, "mean": 1.5, "most": 2.0}
    assert strengths["neutral"] == {"least": 0.0, "mean": 0.0, "most": 0.0}
    assert "attributes and their strengths" in braces(*call, "--check").out


@pytest.mark.parametrize("command", ["merge", "train", "find"])
def test_a_folder_without_attributes_is_refused(
    braces: Any, model_dir: Path, adapter_dir: Path, rows: Path, tmp_path: Path, command: str
) -> None:
    """A folder that does not exist, and an empty folder."""
    (tmp_path / "empty").mkdir()
    call = {
        "merge": ["merge", "--adapter", adapter_dir, "--attribute", "positive", "--output-dir", tmp_path / "m"],
        "train": ["train", "--data", rows, "--attribute-field", "mood", "--output-dir", tmp_path / "t"],
        "find": ["inspect", "find", "--attribute", "positive"],
    }[command]
    for folder, message in (("nowhere", "no such folder"), ("empty", "no attribute file")):
        outcome = braces(*call, "--model", model_dir, "--attributes", tmp_path / folder)
        assert outcome.code == 2, outcome.err
        assert message in outcome.err


def test_missing_cells_of_csv_are_reported_and_dropped(braces: Any, model_dir: Path, tmp_path: Path) -> None:
    """Blank cells and the usual words for missing values; in JSON the same letters are text."""
    path = tmp_path / "rows.csv"
    path.write_text("prompt,completion\na,good\nb,\nc,NaN\nNA,fine\ne,null\nf,Nancy\n")
    call = ("train", "--model", model_dir, "--check", "--format", "json", "--data")
    found = braces(*call, path).json["data"]
    assert (found["rows"], found["dropped"]) == (6, 4)
    assert found["dropped_at"] == [f"{path}:{line}" for line in (3, 4, 5, 6)]
    lines = tmp_path / "rows.jsonl"
    lines.write_text('{"prompt": "a", "completion": "NaN"}\n')
    assert braces(*call, lines).json["data"]["dropped"] == 0


def test_a_short_run_has_metrics_and_reaches_its_rate(braces: Any, model_dir: Path, rows: Path, tmp_path: Path) -> None:
    """Fewer steps than the warm-up; a run in the folder is continued, not overwritten."""
    call = ("train", "--model", model_dir, "--data", rows, "--output-dir", tmp_path / "out", "--max-steps", 8)
    outcome = braces(*call, "--lr", 0.01, "--schedule", "constant", "--logging-steps", 3)
    assert outcome.code == 0, outcome.err
    assert "the warm-up is cut from 20 to 2 steps" in outcome.err
    metrics = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in metrics] == [3, 6, 8]
    assert metrics[0]["lr"] == pytest.approx(0.01)
    again = braces(*call)
    assert again.code == 2
    assert "--resume continues the run" in again.err


def test_a_plan_shows_the_settings_that_have_an_effect(braces: Any, model_dir: Path) -> None:
    """The context of the model, no options of other methods."""
    call = ("train", "--model", model_dir, "--max-steps", 40, "--dry-run")
    settings = braces(*call, "--format", "json").json["settings"]
    assert settings["max_length"] == 128
    shown = braces(*call).out
    assert "max length" in shown
    for name in ("lora alpha", "epochs", "margin", "strength field"):
        assert name not in shown


def test_a_text_file_has_a_row_per_line(braces: Any, model_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.txt"
    path.write_text("the film is good\n\na day\n")
    found = braces("train", "--model", model_dir, "--data", path, "--check", "--format", "json").json["data"]
    assert (found["rows"], found["formats"]) == (2, {"text": 2})
