"""Every recipe loads with no hub in reach and says what it is; the small one runs on the shared data."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

RECIPES = sorted((Path(__file__).parents[2] / "recipes").rglob("*.yaml"))
TASKS = ("commonsense", "zero-shot", "sentiment", "detoxification")
MODELS = ("qwen2.5-1.5b", "llama-2-7b", "llama-3-8b")
ATTRIBUTES = ("sentiment", "detoxification")


def training(path: Path) -> bool:
    """Whether a recipe is one of `braces train`; others may stand beside it."""
    return "braces train --config" in path.read_text(encoding="utf-8")


TRAINING = [path for path in RECIPES if training(path)]


def test_there_is_a_recipe_for_every_task_and_model():
    """Four tasks, three models, and a small one that anybody can run."""
    wanted = {f"{task}-{model}.yaml" for task in TASKS for model in MODELS} | {"small-sentiment.yaml"}
    assert wanted <= {path.name for path in TRAINING}


@pytest.mark.parametrize("path", TRAINING, ids=lambda path: path.name)
def test_a_recipe_loads_without_a_hub(braces, path):
    """Known keys, settings that fit together, the parameter count left open; a header that names the file."""
    outcome = braces("train", "--config", path, "--dry-run", "--format", "json")
    assert outcome.code == 0, outcome.err
    found = outcome.json
    if "model" not in yaml.safe_load(path.read_text(encoding="utf-8")):
        assert found["trainable_parameters"] > 0  # of the model that comes with braces
        return
    assert found["trainable_parameters"] is None
    assert found["reason"]
    for key, value in yaml.safe_load(path.read_text(encoding="utf-8")).items():
        assert found["settings"][key] == value, key
    header = "".join(line for line in path.open(encoding="utf-8") if line.startswith("#"))
    assert {"Run", "Then", "Needs"} <= set(re.findall(r"^# ([A-Z]\w+) ", header, re.MULTILINE))
    assert f"braces train --config recipes/train/{path.name}" in header
    assert not re.search(r"(?<![\w.])/\w+/|~/", header), "a path of somebody's machine"


@pytest.mark.parametrize("path", [p for p in TRAINING if p.name.startswith(TASKS)], ids=lambda path: path.name)
def test_a_recipe_of_plain_rows_serves_the_baseline_too(braces, path):
    """With the baseline's own rate; a recipe of attributes is refused instead."""
    outcome = braces("train", "--config", path, "--method", "lora", "--rank", 16, "--dry-run", "--format", "json")
    if path.name.startswith(ATTRIBUTES):
        assert outcome.code == 2
        assert "--attribute-field" in outcome.err
    else:
        assert outcome.code == 0, outcome.err
        assert (outcome.json["method"], outcome.json["settings"]["lr"]) == ("lora", 1e-3)


def test_a_key_that_is_none_is_seen(braces, tmp_path):
    """The dry run above can fail."""
    path = tmp_path / "bad.yaml"
    path.write_text(TRAINING[0].read_text(encoding="utf-8") + "warmup_step: 3\n", encoding="utf-8")
    outcome = braces("train", "--config", path, "--dry-run")
    assert outcome.code == 2
    assert "warmup-steps" in outcome.err


def test_the_small_recipe_runs_on_real_rows(braces, shared, tmp_path):
    """Two steps of it, with attributes, on a real model."""
    path = next(path for path in TRAINING if path.name == "small-sentiment.yaml")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join((shared / "data/sst5/dev.jsonl").open(encoding="utf-8").readlines()[:40]))
    outcome = braces(
        "train", "--config", path, "--model", shared / "models/stories260K", "--data", rows, "--eval-data", rows,
        "--max-steps", 2, "--output-dir", tmp_path / "out", "--format", "json",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert outcome.json["condition_parameters"] > 0
    assert (tmp_path / "out" / "attributes.safetensors").is_file()
