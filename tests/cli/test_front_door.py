"""What a newcomer meets: mistyped names, missing cells, short runs, plans, and the report for a bug."""

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


def test_a_mistyped_strength_field_is_refused(braces: Any, model_dir: Path, rows: Path) -> None:
    """With the name that is near; also in a stream."""
    call = ("train", "--model", model_dir, "--data", rows, "--attribute-field", "mood")
    for more in (["--check"], ["--streaming", "--max-steps", 1, "--output-dir", rows.parent / "out"]):
        outcome = braces(*call, "--strength-field", "scroe", *more)
        assert outcome.code == 3, outcome.err
        assert "no row has a strength `scroe`" in outcome.err
        assert "Did you mean score?" in outcome.err
    assert braces(*call, "--strength-field", "score", "--check").code == 0
    assert braces(*call, "--check").code == 0  # rows need no strength where none is named


def test_check_shows_strengths_by_attribute(braces: Any, model_dir: Path, rows: Path) -> None:
    """Least, mean and most, as JSON and as a table."""
    call = ("train", "--model", model_dir, "--data", rows, "--columns", "attribute=mood,strength=score,text=text")
    strengths = braces(*call, "--check", "--format", "json").json["data"]["strengths"]
    assert strengths["positive"] == {"least": 1.0, "mean": 1.5, "most": 2.0}
    assert strengths["neutral"] == {"least": 0.0, "mean": 0.0, "most": 0.0}
    assert "attributes and their strengths" in braces(*call, "--check").out


@pytest.mark.parametrize("command", ["merge", "train", "find"])
def test_a_mistyped_attributes_folder_is_refused(
    braces: Any, model_dir: Path, adapter_dir: Path, rows: Path, tmp_path: Path, command: str
) -> None:
    """One that is not there, and one that holds no attribute."""
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


def test_a_built_in_list_in_place_of_a_file_is_said(braces: Any, model_dir: Path, tmp_path: Path) -> None:
    """The folder holds another attribute."""
    folder = tmp_path / "attributes"
    braces("attr-build", "--model", model_dir, "--attribute", "warm", "--words", "good", "--output-dir", folder)
    call = ("steer", "--model", model_dir, "--prompt", "a", "--max-new-tokens", 2, "--attributes", folder)
    assert "its built-in word list is used" in braces(*call, "--attribute", "positive").err
    assert "built-in" not in braces(*call, "--attribute", "warm").err


def test_missing_cells_of_csv_are_named_and_left_out(braces: Any, model_dir: Path, tmp_path: Path) -> None:
    """Blank ones, and what programs write for no value; in JSON the same letters are text."""
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
    """Fewer steps than --logging-steps and than the warm-up; a run that is there is continued, not overwritten."""
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


def test_lines_of_text_are_rows(braces: Any, model_dir: Path, tmp_path: Path) -> None:
    """Blank lines are none."""
    path = tmp_path / "rows.txt"
    path.write_text("the film is good\n\na day\n")
    found = braces("train", "--model", model_dir, "--data", path, "--check", "--format", "json").json["data"]
    assert (found["rows"], found["formats"]) == (2, {"text": 2})


@pytest.mark.parametrize("command", ["train", "eval", "steer", "merge", "attr-build"])
def test_a_dry_run_is_a_table_or_json_for_every_command(
    braces: Any, model_dir: Path, adapter_dir: Path, command: str
) -> None:
    """The format decides; what is empty is left out of the table."""
    more = {
        "eval": ["--tasks", "popqa"],
        "merge": ["--adapter", adapter_dir, "--output-dir", "out"],
        "steer": ["--prompt", "a"],
    }
    call = (command, "--model", model_dir, *more.get(command, []), "--dry-run", "--format")
    assert "model" in braces(*call, "json").json["settings"]
    shown = braces(*call, "table").out
    assert "dry run" in shown
    assert "None" not in shown
    assert "()" not in shown


def test_a_plan_shows_what_takes_effect(braces: Any, model_dir: Path) -> None:
    """No more tokens than the model's context, no longer warm-up than the run allows, no option of other methods."""
    call = ("train", "--model", model_dir, "--max-steps", 40, "--dry-run")
    settings = braces(*call, "--format", "json").json["settings"]
    assert (settings["max_length"], settings["warmup_steps"]) == (128, 10)
    shown = braces(*call).out
    assert "max length" in shown
    for name in ("lora alpha", "epochs", "margin", "strength field"):
        assert name not in shown


def test_texts_alone_go_into_a_pipe(braces: Any, model_dir: Path) -> None:
    """`--format text`: each prompt with its continuation; prompts from `-` are those of the pipe."""
    call = ("steer", "--model", model_dir, "--prompts", "-", "--max-new-tokens", 4, "--device", "cpu")
    rows = braces(*call, "--format", "json", stdin="the film is\na day\n").lines
    shown = braces(*call, "--format", "text", stdin="the film is\na day\n")
    assert shown.out == "".join(f"{row['prompt']}{row['text']}\n\n" for row in rows)
    assert braces(*call, "--format", "text", "--show-unsteered", stdin="a\n").code == 2
    table = braces(*call, "--format", "table", stdin="the film is\na day\n").out
    assert f"prompt: {rows[0]['prompt']}" in table


def test_short_names_of_number_formats(braces: Any, model_dir: Path) -> None:
    """As other tools call them."""
    for short, name in (("bf16", "bfloat16"), ("fp16", "float16"), ("bfloat16", "bfloat16")):
        outcome = braces("steer", "--model", model_dir, "--dtype", short, "--dry-run", "--format", "json")
        assert outcome.json["settings"]["dtype"] == name
    assert braces("steer", "--dtype", "bf15", "--dry-run").code == 2


def test_env_names_versions_devices_and_caches(braces: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no token."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    outcome = braces("env", "--format", "json")
    assert {"braces", "python", "system", "versions", "devices", "threads", "caches", "variables"} == set(outcome.json)
    assert {"torch", "transformers"} <= set(outcome.json["versions"])
    table = braces("env").out
    assert "torch" in table
    assert "hf_secret" not in outcome.out + table


@pytest.mark.parametrize("command", ["merge", "attr-build"])
def test_an_upload_is_checked_first_and_done_last(
    braces: Any, model_dir: Path, adapter_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """By the function that uploads adapters, with what the command wrote."""
    from braces_cli.core.models import hub

    calls: list[Any] = []
    monkeypatch.setattr(hub, "check_push", lambda repo: calls.append(("check", repo)))
    monkeypatch.setattr(hub, "push", lambda folder, repo, *rest: calls.append((folder, repo, *rest)))
    out = tmp_path / "out"
    call = {
        "merge": ("merge", "--adapter", adapter_dir, "--output-dir", out),
        "attr-build": (
            "attr-build",
            "--model",
            model_dir,
            "--attribute",
            "warm",
            "--words",
            "good",
            "--output-dir",
            out,
        ),
    }[command]
    outcome = braces(*call, "--push-to-hub", "me/it")
    assert outcome.code == 0, outcome.err
    files = [["warm.safetensors"]] if command == "attr-build" else []
    assert calls == [("check", "me/it"), (out, "me/it", *files)]


def test_a_folder_that_merge_did_not_write_cannot_be_checked(braces: Any, model_dir: Path) -> None:
    """The hint names a folder of merge, not an option that checking does not need."""
    outcome = braces("merge", "--check", model_dir)
    assert outcome.code == 4
    assert "no checkpoint that braces merge wrote" in outcome.err


def test_results_are_called_by_words_a_reader_knows(braces: Any, model_dir: Path, rows: Path, tmp_path: Path) -> None:
    """No names of code in the table of a training run, and sizes with their units; JSON keeps its keys."""
    call = ("train", "--model", model_dir, "--data", rows, "--eval-data", rows, "--max-steps", 2)
    shown = braces(*call, "--output-dir", tmp_path / "a").out
    for jargon in ("token path", "without end", "without_end"):
        assert jargon not in shown
    assert "end tokens not counted" in shown
    assert "B" in next(line for line in shown.splitlines() if "peak memory" in line)
    assert "side_path_share" in braces(*call, "--output-dir", tmp_path / "b", "--format", "json").json
