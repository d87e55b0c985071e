"""The Python interface: the five lines of its docstring, held to what the command line gives."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import braces_cli as braces
from braces_cli.core.utils.errors import ConfigError, ModelError

PROMPTS = ["the film is", "a day"]


@pytest.fixture
def model(model_dir: Path, adapter_dir: Path) -> Any:
    """The tiny model with its adapter, opened by the adapter's folder alone."""
    return braces.load(adapter_dir, device="cpu")


def test_texts_are_those_of_the_command_line(model: Any, adapter_dir: Path, braces_command: Any) -> None:
    """At the same seed, steered and not."""
    options = ["--adapter", adapter_dir, "--device", "cpu", "--max-new-tokens", 8, "--format", "json"]
    asked = [part for prompt in PROMPTS for part in ("--prompt", prompt)]
    plain = braces_command("steer", *options, *asked)
    steered = braces_command("steer", *options, *asked, "--attribute", "positive", "--s", 30)
    assert model.generate(PROMPTS, max_new_tokens=8) == [row["text"] for row in plain.lines]
    pushed = model.steer("positive", 30)
    assert pushed.generate(PROMPTS, max_new_tokens=8) == [row["text"] for row in steered.lines]
    assert plain.lines != steered.lines
    # Steering has changed neither the model nor what is open.
    assert model.generate(PROMPTS[0], max_new_tokens=8) == plain.lines[0]["text"]


@pytest.fixture
def braces_command(request: pytest.FixtureRequest) -> Any:
    """Calls the command line; the name `braces` is the package here."""
    return request.getfixturevalue("braces")


def test_attributes_from_words_add_up(model: Any) -> None:
    """And one cannot be set twice."""
    both = model.steer("warm", 2, words=["good", "happy"]).steer("negative", -1)
    assert [(attribute.name, s) for attribute, s in both.terms] == [("warm", 2), ("negative", -1)]
    assert model.terms == ()
    with pytest.raises(ConfigError, match="already"):
        both.steer("warm")
    with pytest.raises(ConfigError, match="unknown attribute"):
        model.steer("positve")


def test_inspect_is_that_of_the_command_line(model: Any, adapter_dir: Path, braces_command: Any) -> None:
    """Without reading the base's files again."""
    shown = braces_command("inspect", "--adapter", adapter_dir, "--format", "json").json
    assert model.inspect() == shown


def test_an_adapter_is_trained_and_opened(model_dir: Path, tmp_path: Path) -> None:
    """By the names of the command line's options; a name that is none is refused with a suggestion."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"the {w} film is good"}) + "\n" for w in ("old", "sad", "good")))
    result = braces.train(rows, tmp_path / "out", model=str(model_dir), max_steps=2, rank=4, device="cpu")
    assert result["steps"] == 2
    assert braces.load(tmp_path / "out").session.config.r == 4
    with pytest.raises(ConfigError, match="Did you mean max_steps"):
        braces.train(rows, tmp_path / "other", max_step=2)


def test_what_cannot_be_opened_is_an_error(model_dir: Path, adapter_dir: Path) -> None:
    """Of the classes that the command line reports."""
    with pytest.raises(ModelError):
        braces.load("./nowhere")
    with pytest.raises(ConfigError, match="two adapters"):
        braces.load(adapter_dir, adapter=adapter_dir)
    assert braces.load(model_dir, adapter=adapter_dir).session.adapter is not None
    assert braces.load(model_dir).session.adapter is None


def test_the_package_itself_imports_nothing_heavy() -> None:
    """Only the use of a name does."""
    code = "import sys, braces_cli; dir(braces_cli); assert 'torch' not in sys.modules; braces_cli.load; import torch"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError):
        _ = braces.nothing
