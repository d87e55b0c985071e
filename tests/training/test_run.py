"""`braces train --adapter`: training continues from a stored adapter, on other rows."""

from __future__ import annotations

import json
from typing import Any

import pytest
from safetensors.torch import load_file

from braces_cli.core.errors import ConfigError, ModelError
from braces_cli.training.run import resolve
from braces_cli.training.settings import TrainSettings
from tests.conftest import make_adapter, tiny_model, tiny_tokenizer


@pytest.fixture
def rows(tmp_path: Any) -> Any:
    """Texts with attribute and strength."""
    path = tmp_path / "rows.jsonl"
    words = {"good": "positive", "happy": "positive", "sad": "negative", "old": "neutral"}
    lines = [{"text": f"the {w} film and the {v} end", "mood": words[w], "how": 2} for w in words for v in words]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def train(braces: Any, model_dir: Any, rows: Any, tmp_path: Any) -> Any:
    """Train for a few steps into a folder."""

    def run(name: str, *args: Any, base: bool = True) -> Any:
        model = ("--model", model_dir) if base else ()
        return braces(
            "train", *model, "--data", rows, "--output-dir", tmp_path / name, "--device", "cpu",
            "--lr", 0.01, "--format", "json", *args,
        )  # fmt: skip

    return run


def test_training_continues_from_an_adapter(train: Any, rows: Any, tmp_path: Any) -> None:
    """Rank, relevance scale, layers and base are those of the adapter, and so is the first loss."""
    first = train("a", "--max-steps", 30, "--rank", 3, "--layers", "1-", "--gate-lr", 0.3)
    assert first.code == 0, first.err
    again = train("b", "--adapter", tmp_path / "a", "--max-steps", 1, "--eval-data", rows, base=False)
    assert again.code == 0, again.err
    before, config = (json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in "ab")
    assert (config["r"], config["layers"]) == (3, [1])
    assert config["relevance_scale"] == before["relevance_scale"] != [1.0]
    refused = train("c", "--adapter", tmp_path / "a", "--relevance-scale", 1, base=False)
    assert refused.code == 2
    assert "--relevance-scale" in refused.err
    steps = [json.loads(line) for line in (tmp_path / "b" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in steps] == [1]
    assert again.json["base_eval_loss"] - steps[0]["loss"] > 0.01
    old, new = (load_file(tmp_path / name / "adapter_model.safetensors") for name in "ab")
    assert any((old[key] != new[key]).any() for key in old)


def test_attributes_of_the_adapter_are_kept(train: Any, rows: Any, tmp_path: Any) -> None:
    """Attributes of the new rows are added; a run without an attribute field is refused."""
    fields = ("--attribute-field", "mood", "--strength-field", "how")
    assert train("a", "--max-steps", 2, *fields).code == 0
    rows.write_text(json.dumps({"text": "the happy end", "mood": "joyful", "how": 1}) + "\n")
    assert train("b", "--adapter", tmp_path / "a", "--max-steps", 1, *fields).code == 0
    config = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert config["attributes"] == ["joyful", "negative", "positive"]
    refused = train("c", "--adapter", tmp_path / "a", "--max-steps", 1)
    assert refused.code == 2
    assert "--attribute-field" in refused.err


def test_settings_that_do_not_fit_the_adapter(train: Any, tmp_path: Any) -> None:
    """Another rank, a baseline, a folder without an adapter."""
    assert train("a", "--max-steps", 1, "--rank", 4).code == 0
    for args, code, message in (
        (("--rank", 8), 2, "the adapter has rank 4"),
        (("--method", "lora"), 2, "cannot continue from an adapter"),
    ):
        outcome = train("b", "--adapter", tmp_path / "a", "--max-steps", 1, *args)
        assert outcome.code == code, outcome.err
        assert message in outcome.err
    assert train("b", "--adapter", tmp_path / "none", "--max-steps", 1).code == 4
    hint = train("b", "--model", tmp_path / "a", "--max-steps", 1, base=False)
    assert "Give it as --adapter" in hint.err
    shown = train("b", "--adapter", tmp_path / "a", "--dry-run").json["settings"]
    assert (shown["rank"], shown["layers"]) == (4, "0,1")


def test_layers_beyond_the_base(session, model_dir, tmp_path) -> None:
    folder = make_adapter(session, tmp_path / "adapter")
    assert resolve(TrainSettings(adapter=str(folder))).layers == [0, 1]
    with pytest.raises(ConfigError, match="out of range"):
        resolve(TrainSettings(model=str(model_dir), layers="0,99"))
    smaller = tmp_path / "smaller"
    tiny_model("llama", num_hidden_layers=1).save_pretrained(smaller)
    tiny_tokenizer().save_pretrained(smaller)
    with pytest.raises(ModelError, match="does not fit the base") as caught:
        resolve(TrainSettings(model=str(smaller), adapter=str(folder)))
    assert caught.value.where == str(folder)
