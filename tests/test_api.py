"""The Python interface: the five lines of its docstring, held to what the command line gives."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import braces_cli as braces
from braces_cli.core.errors import ConfigError, ModelError

PROMPTS = ["the film is", "a day"]


@pytest.fixture
def model(model_dir: Path, adapter_dir: Path) -> Any:
    """The tiny model with its adapter, loaded from the adapter's folder."""
    return braces.load(adapter_dir, device="cpu")


def test_texts_equal_those_of_the_command_line(model: Any, adapter_dir: Path, braces_command: Any) -> None:
    """With the same seed, steered and unsteered."""
    options = ["--adapter", adapter_dir, "--device", "cpu", "--max-new-tokens", 8, "--format", "json"]
    asked = [part for prompt in PROMPTS for part in ("--prompt", prompt)]
    plain = braces_command("steer", *options, *asked)
    asked += ["--attribute", "positive", "--s", 30]
    steered = braces_command("steer", *options, *asked)
    assert model.generate(PROMPTS, max_new_tokens=8) == [row["text"] for row in plain.lines]
    steered_model = model.steer("positive", 30)
    assert steered_model.generate(PROMPTS, max_new_tokens=8) == [row["text"] for row in steered.lines]
    assert plain.lines != steered.lines
    scoped = braces_command("steer", *options, *asked, "--scope", "generated")
    texts = model.steer("positive", 30, scope="generated").generate(PROMPTS, max_new_tokens=8)
    assert texts == [row["text"] for row in scoped.lines] != [row["text"] for row in steered.lines]
    # Steering has changed neither the model nor what is open.
    assert model.generate(PROMPTS[0], max_new_tokens=8) == plain.lines[0]["text"]


@pytest.fixture
def braces_command(request: pytest.FixtureRequest) -> Any:
    """The command line; `braces` is the package here."""
    return request.getfixturevalue("braces")


def test_attributes_add_up(model: Any) -> None:
    """An attribute cannot be set twice."""
    both = model.steer("warm", 2, words=["good", "happy"]).steer("negative", -1)
    assert [(attribute.name, s) for attribute, s in both.terms] == [("warm", 2), ("negative", -1)]
    assert model.terms == ()
    assert repr(both) == f"{repr(model)[:-1]}, warm +2, negative -1)"
    assert repr(model) == f"Model({model.session.base.name}, {model.session.stored.name})"
    with pytest.raises(ConfigError, match="already"):
        both.steer("warm")
    with pytest.raises(ConfigError, match="unknown attribute"):
        model.steer("positve")


def test_inspect_equals_the_command_line(model, adapter_dir, braces_command, monkeypatch):
    """Without reading the files of the base again."""
    shown = braces_command("inspect", "--adapter", adapter_dir, "--format", "json").json
    monkeypatch.delattr("braces_cli.core.adapter.model.load_shape")
    assert model.inspect() == shown


def test_train_and_load(model_dir: Path, tmp_path: Path) -> None:
    """Settings have the names of the options; an unknown name has a suggestion."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"the {w} film is good"}) + "\n" for w in ("old", "sad", "good")))
    result = braces.train(rows, tmp_path / "out", model=str(model_dir), max_steps=2, rank=4, device="cpu")
    assert result["steps"] == 2
    assert braces.load(tmp_path / "out").session.config.r == 4
    with pytest.raises(ConfigError, match="Did you mean max_steps"):
        braces.train(rows, tmp_path / "other", max_step=2)
    with pytest.raises(ConfigError, match="rank: `four` is not a whole number"):
        braces.train(rows, tmp_path / "other", rank="four")


def test_types_of_values(model_dir: Path, adapter_dir: Path, tmp_path: Path) -> None:
    """Paths, lists, mappings and torch types; a single word, stop text or layer is not a list of letters."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"body": "the film is good"}\n' * 3)
    given = {"columns": {"text": "body"}, "eval_data": rows, "layers": [1], "dtype": torch.float32, "model": model_dir}
    given["opposites"] = None
    result = braces.train([rows], tmp_path / "out", max_steps=1, rank=4, device=torch.device("cpu"), **given)
    assert result["eval_loss"] > 0
    model = braces.load(tmp_path / "out", device="cpu")
    assert model.session.config.layers == [1]
    assert model.steer("warm", words="good").terms[0][0].words == ["good"]
    whole = model.generate("the film", max_new_tokens=12, temperature=0.0)
    # Taken letter by letter, this stop text would stop earlier.
    stop = next(whole[i : i + 3] for i in range(1, len(whole) - 2) if {*whole[i : i + 3]} & {*whole[:i]})
    assert model.generate("the film", max_new_tokens=12, temperature=0.0, stop=stop) == whole[: whole.index(stop)]
    assert model.steer("warm", words=["good"], layers=1).layers == "1"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: model.generate("a", max_tokens=3), "Did you mean max_new_tokens"),
        (lambda model: model.generate("a", batch_size=0), "batch_size: 0 is not a whole number of at least 1"),
        (lambda model: model.generate(None), "PROMPTS|prompts: missing"),
        (lambda model: model.generate({"prompt": "a"}), "prompts: {'prompt': 'a'} is not text"),
        (lambda model: model.generate(torch.tensor([5])), "is not text"),
        (lambda model: model.steer("positive", layers=[]), r"layers: \[\] is not text"),
        (lambda model: model.steer("positive", "two"), "s: `two` is not a number"),
        (lambda model: model.steer("warm", words=[]), "words: no words"),
        (lambda model: braces.load(devise="cpu"), "no setting `devise`"),
    ],
)
def test_invalid_values(model: Any, call: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call(model)


def test_invalid_folders(model_dir: Path, adapter_dir: Path) -> None:
    with pytest.raises(ModelError):
        braces.load("./nowhere")
    with pytest.raises(ConfigError, match="two adapters"):
        braces.load(adapter_dir, adapter=adapter_dir)
    assert braces.load(model_dir, adapter=adapter_dir).session.adapter is not None
    assert braces.load(model_dir).session.adapter is None


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import sys, braces_cli; dir(braces_cli); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError):
        _ = braces.nothing
