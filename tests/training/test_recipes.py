"""Every recipe loads without a hub and has a complete header; the small one trains on real rows."""

import re
from pathlib import Path

import pytest
import yaml

RECIPES = sorted((Path(__file__).parents[2] / "braces_cli" / "assets" / "recipes").glob("*.yaml"))
TASKS = ("commonsense", "zero-shot", "sentiment", "detoxification")
MODELS = ("qwen2.5-1.5b", "llama-2-7b", "llama-3-8b")
ATTRIBUTES = ("sentiment", "detoxification")
# Layers and width of each model, and the parameters of LoRA of rank 16 on its queries and values.
SIZES = {
    "qwen2.5-1.5b": (28, 1536, 2_179_072),
    "llama-2-7b": (32, 4096, 8_388_608),
    "llama-3-8b": (32, 4096, 6_815_744),
}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_a_recipe_loads_without_a_hub(braces, path):
    """Known keys, consistent settings, an open parameter count; a header with the file name."""
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
    assert f"braces recipe copy {path.stem}\n" in header
    assert f"braces train --config {path.name} " in header
    assert not re.search(r"(?<![\w.])/\w+/|~/", header), "a local path"


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("task", TASKS)
def test_parameters_in_the_header(task, model):
    """The number, and its share of that of LoRA."""
    text = next(path for path in RECIPES if path.name == f"{task}-{model}.yaml").read_text(encoding="utf-8")
    recipe = yaml.safe_load(text)
    rank = recipe["rank"]
    layers, width, of_lora = SIZES[model]
    trained = layers * (rank * width + 1)
    assert f"{trained:,} trained parameters" in text
    if "LoRA r=16's" in text:
        assert f"{trained / of_lora:.2f} of LoRA r=16's {of_lora:,}" in text


@pytest.mark.parametrize("task", TASKS)
def test_recipe_for_a_baseline(braces, task):
    """A recipe with attributes is refused."""
    path = next(path for path in RECIPES if path.name.startswith(task))
    outcome = braces("train", "--config", path, "--method", "lora", "--rank", 16, "--dry-run", "--format", "json")
    if task in ATTRIBUTES:
        assert outcome.code == 2
        assert "--attribute-field" in outcome.err
    else:
        assert outcome.code == 0, outcome.err
        assert outcome.json["method"] == "lora"


def test_the_small_recipe_runs_on_real_rows(braces, shared, tmp_path):
    """Two steps with attributes, on a trained model."""
    path = next(path for path in RECIPES if path.name == "small-sentiment.yaml")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join((shared / "data/sst5/dev.jsonl").open(encoding="utf-8").readlines()[:40]))
    outcome = braces(
        "train", "--config", path, "--model", shared / "models/stories260K", "--data", rows, "--eval-data", rows,
        "--max-steps", 2, "--output-dir", tmp_path / "out", "--format", "json",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert outcome.json["condition_parameters"] > 0
    assert (tmp_path / "out" / "attributes.safetensors").is_file()
