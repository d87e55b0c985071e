"""A mistyped `--attributes DIR` is an error of every command, never a built-in list in its place."""

from __future__ import annotations

import json

import pytest

from braces_cli.core.attributes.files import list_attributes
from braces_cli.core.attributes.lookup import find_attribute, known_attributes
from braces_cli.core.attributes.options import AttributeSettings, parse_strengths
from braces_cli.core.config import build
from braces_cli.core.errors import ConfigError


def test_a_folder_that_is_not_there_is_refused_before_anything_is_loaded(tmp_path):
    with pytest.raises(ConfigError, match="no such folder"):
        build(AttributeSettings, {"attributes": tmp_path / "attrs"})
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="cannot read this folder"):
        build(AttributeSettings, {"attributes": tmp_path / "file"})
    with pytest.raises(ConfigError, match="no attribute file"):
        build(AttributeSettings, {"attributes": tmp_path})
    (tmp_path / "warm.safetensors").touch()
    assert build(AttributeSettings, {"attributes": tmp_path}).attributes == tmp_path


@pytest.mark.parametrize(
    "look_up",
    [
        lambda session, folder: find_attribute(session, "positive", folder),
        known_attributes,
        lambda session, folder: list_attributes(folder, None),
    ],
)
def test_no_look_up_passes_over_it(session, tmp_path, look_up):
    with pytest.raises(ConfigError, match="no such folder"):
        look_up(session, tmp_path / "attrs")


@pytest.mark.parametrize("command", ["eval", "merge", "train", "inspect find"])
def test_every_command_refuses_it(braces, model_dir, adapter_dir, tmp_path, command):
    prompts, rows = tmp_path / "prompts.txt", tmp_path / "rows.jsonl"
    prompts.write_text("the film\n")
    rows.write_text(json.dumps({"prompt": "the film", "completion": " is good", "attribute": "positive"}) + "\n")
    options = {
        "eval": ["--tasks", "sentiment", "--task-data", f"sentiment={prompts}", "--attribute", "positive"],
        "merge": ["--adapter", adapter_dir, "--output-dir", tmp_path / "merged", "--attribute", "positive"],
        "train": ["--data", rows, "--attribute-field", "attribute", "--output-dir", tmp_path / "out"],
        "inspect find": ["--attribute", "positive"],
    }[command]
    options += ["--attributes", tmp_path / "a"]
    outcome = braces(*command.split(), "--model", model_dir, "--device", "cpu", *options)
    assert outcome.code == 2, outcome.err
    assert "no such folder" in outcome.err
    assert str(tmp_path / "a") in outcome.err


def test_strengths():
    """Both ends included, a plain zero on the way, no drift."""
    assert parse_strengths("-0.3:0.3:0.1") == [-0.3, -0.2, -0.1, 0.0, 0.1, 0.2, 0.3]
    assert parse_strengths("2:-2:-2") == [2.0, 0.0, -2.0]
    assert parse_strengths("-4:4:3") == [-4.0, -1.0, 2.0]
    assert parse_strengths("3,0,-1.5,0") == [3.0, 0.0, -1.5]
