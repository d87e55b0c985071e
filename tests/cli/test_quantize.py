"""`--quantize` from the command line."""

import importlib.util
import json

import pytest


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": "the good film and the happy end"}) + "\n" * 8)
    return path


def test_a_quantised_base_is_trained_steered_and_inspected(braces, model_dir, rows, tmp_path):
    """The adapter also loads on the plain base."""
    if importlib.util.find_spec("torchao") is None:
        pytest.skip("NOT TESTED ON A QUANTISED BASE: torchao is not installed (pip install 'braces-cli[quantize]')")
    out = tmp_path / "out"
    packed = ("--device", "cpu", "--quantize", "int8", "--format", "json")
    outcome = braces(
        "train", "--model", model_dir, "--data", rows, "--eval-data", rows, "--rank", 4, "--max-steps", 10,
        "--warmup-steps", 0, "--lr", 0.01, "--gate-lr", 0.3, "--output-dir", out, *packed,
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert outcome.json["eval_loss"] < outcome.json["base_eval_loss"]
    prompt = ("--prompt", "the film", "--max-new-tokens", 4, "--temperature", 0)
    texts = [braces("steer", "--adapter", out, *prompt, *options) for options in (packed, ("--format", "json"))]
    assert [text.code for text in texts] == [0, 0]
    values = braces("inspect", "values", "--model", model_dir, "--layers", 0, "--index", 7, "--top-k", 2, *packed)
    assert [row["index"] for row in values.lines] == [7]
