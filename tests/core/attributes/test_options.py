"""Options of attributes: a mistyped `--attributes DIR` is an error of every command; lists of strengths."""

from __future__ import annotations

import json

import pytest

from braces_cli.core.attributes.options import AttributeSettings, parse_strengths
from braces_cli.core.config import build
from braces_cli.core.errors import ConfigError


def test_a_folder_without_attributes_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no such folder"):
        build(AttributeSettings, {"attributes": tmp_path / "attrs"})
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="cannot read this folder"):
        build(AttributeSettings, {"attributes": tmp_path / "file"})
    with pytest.raises(ConfigError, match="no attribute file"):
        build(AttributeSettings, {"attributes": tmp_path})
    (tmp_path / "warm.safetensors").touch()
    assert build(AttributeSettings, {"attributes": tmp_path}).attributes == tmp_path


@pytest.mark.parametrize("command", ["eval", "train"])
def test_every_command_refuses_a_missing_folder(braces, model_dir, tmp_path, command):
    prompts, rows = tmp_path / "prompts.txt", tmp_path / "rows.jsonl"
    prompts.write_text("the film\n")
    rows.write_text(json.dumps({"prompt": "the film", "completion": " is good", "attribute": "positive"}) + "\n")
    options = {
        "eval": ["--tasks", "sentiment", "--task-data", f"sentiment={prompts}", "--attribute", "positive"],
        "train": ["--data", rows, "--attribute-field", "attribute", "--output-dir", tmp_path / "out"],
    }[command]
    options += ["--attributes", tmp_path / "a"]
    outcome = braces(command, "--model", model_dir, "--device", "cpu", *options)
    assert outcome.code == 2, outcome.err
    assert "no such folder" in outcome.err
    assert str(tmp_path / "a") in outcome.err


def test_strengths():
    """Both ends are included, 0 is exact, and rounding errors do not add up."""
    assert parse_strengths("-0.3:0.3:0.1") == [-0.3, -0.2, -0.1, 0.0, 0.1, 0.2, 0.3]
    assert parse_strengths("2:-2:-2") == [2.0, 0.0, -2.0]
    assert parse_strengths("-4:4:3") == [-4.0, -1.0, 2.0]
    assert parse_strengths("3,0,-1.5,0") == [3.0, 0.0, -1.5]
