"""A damaged base, and numbers that grow too large: named, with what to do, and nothing is left behind."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from braces_cli.core.errors import ModelError
from braces_cli.core.models.weights import check_finite
from tests.conftest import tiny_model

_WEIGHT = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_number_among_all_is_found(value, dtype):
    """In every dtype; a sound model passes, and so do one on the meta device and weights of other kinds."""
    model = tiny_model(dtype=dtype)
    weights = {**dict(model.named_parameters()), "packed": torch.ones(2, dtype=torch.uint8), "empty": torch.empty(0)}
    check_finite(weights, "base")
    with torch.no_grad():
        weights[_WEIGHT][3, 5] = value
    with pytest.raises(ModelError, match=f"base: the weight {_WEIGHT} holds numbers that are not finite"):
        check_finite(weights, "base")
    check_finite({name: weight.to("meta") for name, weight in weights.items()}, "base")


@pytest.fixture
def damaged(model_dir, tmp_path):
    """The tiny base with one NaN."""
    folder = tmp_path / "damaged"
    shutil.copytree(model_dir, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[_WEIGHT][3, 5] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    "args",
    [
        ("train", "--data", "rows.jsonl", "--max-steps", "1", "--output-dir", "new/out"),
        ("eval", "--tasks", "perplexity", "--task-data", "perplexity=rows.jsonl", "--output-dir", "new/out"),
        ("steer", "--prompt", "the", "--output", "new/out.jsonl"),
        ("attr-build", "--attribute", "sad", "--output-dir", "new/out"),
        ("inspect", "values", "--output", "new/out.parquet"),
        ("export", "slots", "--output-dir", "new/out"),
    ],
    ids=lambda args: args[0],
)
def test_every_command_names_the_weight_and_leaves_nothing(args, damaged, braces, tmp_path, monkeypatch):
    """Exit 4, and not so much as a new folder; the folder of an evaluation keeps its record, for --resume."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"text": "the film is good"}\n')
    outcome = braces(*args, "--model", damaged)
    assert outcome.code == 4, outcome.err
    assert f"{damaged}: the weight {_WEIGHT} holds numbers that are not finite" in outcome.err
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if damaged not in path.parents)
    kept = ["new", "new/out", "new/out/run.json"] if args[0] == "eval" else []
    assert left == ["damaged", *kept, "rows.jsonl"]


def test_a_push_that_is_too_strong_is_an_error(braces, model_dir, monkeypatch):
    """Rather than empty texts and exit 0, where the vector is not finite, and where the model's scores are not."""
    steer = ("steer", "--model", model_dir, "--prompt", "the", "--attribute", "sad", "--s")
    outcome = braces(*steer, 1e38)
    assert outcome.code == 2
    assert "--s: the vector that is added in layer 0 is not finite" in outcome.err
    for extra in ((), ("--temperature", 0), ("--num-samples", 3)):
        outcome = braces(*steer, 1e7, "--dtype", "float16", *extra)
        assert outcome.code == 4, outcome.out
        assert "scores of the next token are not finite" in outcome.err
        assert "lower --s" in outcome.err


@pytest.mark.parametrize("part", ["hidden", "reference", "residual", "scale"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_an_attribute_of_such_numbers_is_damaged(part, value, braces, model_dir, tmp_path):
    """Each tensor is checked; zeros are refused where no base computes them."""
    build = ("attr-build", "--model", model_dir, "--attribute", "sad", "--output-dir", tmp_path)
    assert braces(*build).code == 0
    path = tmp_path / "sad.safetensors"
    tensors = load_file(path)
    tensors[f"sad.{part}"].fill_(value)
    with safe_open(path, framework="pt") as file:
        save_file(tensors, path, metadata=file.metadata())
    outcome = braces(
        "steer", "--model", model_dir, "--prompt", "the", "--attribute", "sad", "--s", 1, "--attributes", tmp_path,
        "--format", "json",
    )  # fmt: skip
    if value == 0 and part == "scale":
        assert outcome.code == 0
        return
    assert outcome.code == 4
    zero = "holds norms that are not positive" if part == "residual" else "holds nothing but zeros"
    what = zero if value == 0 else "holds numbers that are not finite"
    assert json.loads(outcome.out)["error"]["message"] == f"sad.{part} {what}"
