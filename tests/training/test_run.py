"""`braces train --adapter`: training continues from a stored adapter, on other rows."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from braces_cli.core.errors import ConfigError, ModelError
from braces_cli.training.run import resolve
from braces_cli.training.settings import TrainSettings
from tests.conftest import make_adapter, tiny_model, tiny_tokenizer, write_rows


def test_training_continues_from_an_adapter(train: Any, mood_rows: Path, tmp_path: Path) -> None:
    """Rank, relevance, layers and base are those of the adapter, and so is the first loss."""
    options = ("--relevance-to", "output", "--rank", 3, "--layers", "1-", "--gate-lr", 0.3)
    first = train(tmp_path / "a", "--max-steps", 30, *options)
    assert first.code == 0, first.err
    continued = ("--adapter", tmp_path / "a", "--max-steps", 1, "--rank", 3)
    again = train(tmp_path / "b", *continued, "--eval-data", mood_rows, base=None)
    assert again.code == 0, again.err
    before, config = (json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in "ab")
    assert (config["r"], config["layers"]) == (3, [1])
    assert config["relevance_to"] == config["training"]["relevance_to"] == "output"
    assert config["relevance_scale"] == before["relevance_scale"] != [1.0]
    steps = [json.loads(line) for line in (tmp_path / "b" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in steps] == [1]
    assert again.json["base_eval_loss"] - steps[0]["loss"] > 0.01
    old, new = (load_file(tmp_path / name / "adapter_model.safetensors") for name in "ab")
    assert any((old[key] != new[key]).any() for key in old)
    trained = load_file(tmp_path / "b" / "checkpoint-1" / "parameters.safetensors")
    assert all(".relevance." in name for name in trained)  # the base is frozen


def test_attributes_of_the_adapter_are_kept(train: Any, tmp_path: Path) -> None:
    """Attributes of the new rows are added; a run without an attribute field is refused."""
    fields = ("--attribute-field", "mood", "--strength-field", "how", "--max-steps", 1)
    assert train(tmp_path / "a", *fields).code == 0
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": "the happy end", "mood": "joyful", "how": 1}])
    assert train(tmp_path / "b", "--adapter", tmp_path / "a", *fields, data=rows).code == 0
    config = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert config["attributes"] == ["joyful", "negative", "positive"]
    refused = train(tmp_path / "c", "--adapter", tmp_path / "a", "--max-steps", 1)
    assert refused.code == 2
    assert "--attribute-field" in refused.err


def test_settings_that_do_not_fit_the_adapter(train: Any, adapter_dir: Path, tmp_path: Path) -> None:
    for adapter, options, code, message in (
        (adapter_dir, ("--rank", 8), 2, "the adapter has rank 4"),
        (adapter_dir, ("--relevance-to", "output"), 2, "the adapter has relevance-to input"),
        (adapter_dir, ("--relevance-scale", 1), 2, "the adapter has another relevance scale"),
        (tmp_path / "none", (), 4, "no such"),
    ):
        outcome = train(tmp_path / "b", "--adapter", adapter, "--max-steps", 1, *options)
        assert outcome.code == code, outcome.err
        assert message in outcome.err


def test_layers_beyond_the_base(session, model_dir, tmp_path) -> None:
    folder = make_adapter(session, tmp_path / "adapter")
    plan = resolve(TrainSettings(adapter=str(folder)))
    assert (plan.layers, plan.settings.rank, plan.settings.layers) == ([0, 1], 4, "0,1")
    assert (plan.base, plan.settings.model) == (str(model_dir), str(model_dir))
    with pytest.raises(ConfigError, match="out of range"):
        resolve(TrainSettings(model=str(model_dir), layers="0,99"))
    smaller = tmp_path / "smaller"
    tiny_model("llama", num_hidden_layers=1).save_pretrained(smaller)
    tiny_tokenizer().save_pretrained(smaller)
    with pytest.raises(ModelError, match="does not fit the base") as caught:
        resolve(TrainSettings(model=str(smaller), adapter=str(folder)))
    assert caught.value.where == str(folder)
