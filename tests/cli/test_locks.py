"""Every command that writes refuses an output that another command is writing."""

from pathlib import Path

import pytest
import typer

from braces_cli.cli.main import build_app
from braces_cli.core.errors import ConfigError
from braces_cli.core.files import output_lock
from braces_cli.export.run import new_folder
from tests.export.models import names

# Options for an output, and for each a command with the path that it locks.
_OUTPUTS = {"output_dir", "output", "plot", "gguf"}
_TRAIN = ("train", "--data", "rows.jsonl", "--max-steps", "1", "--output-dir", "out")
_STEER = ("steer", "--prompt", "the", "--attribute", "positive", "--s", "1")
_SWEEP = ("steer", "--prompt", "the", "--attribute", "positive", "--sweep", "0:1:1")
_CALLS = {
    ("train", "output_dir"): (_TRAIN, "out"),
    ("eval", "output_dir"): (("eval", "--tasks", "perplexity", "--output-dir", "out"), "out"),
    ("attr-build", "output_dir"): (("attr-build", "--attribute", "sad", "--output-dir", "a"), "a/sad.safetensors"),
    ("steer", "output"): ((*_STEER, "--output", "out.jsonl"), "out.jsonl"),
    ("steer", "plot"): ((*_SWEEP, "--plot", "out.png"), "out.png"),
    ("inspect values", "output"): (("inspect", "values", "--output", "out.parquet"), "out.parquet"),
    ("inspect report", "output"): (("inspect", "report", "--output", "out.html"), "out.html"),
    ("merge", "output_dir"): (("merge", "--adapter", "adapter", "--output-dir", "out"), "out"),
    ("export slots", "output_dir"): (("export", "slots", "--output-dir", "out"), "out"),
    ("export code", "output_dir"): (("export", "code", "--adapter", "adapter", "--output-dir", "out"), "out"),
    ("export erase", "output_dir"): (("export", "erase", "--attribute", "sad", "--output-dir", "out"), "out"),
    ("export control-vector", "output"): (
        ("export", "control-vector", "--attribute", "sad", "--s", "1", "--output", "out.gguf"),
        "out.gguf",
    ),
    ("demo", "output_dir"): (("demo", "--output-dir", "out"), "out"),
    ("recipe copy", "output_dir"): (("recipe", "copy", "RECIPE", "--output-dir", "."), "RECIPE.yaml"),
}
# Locked in `new_folder`, after the base with slots was read; see `test_every_export_locks`.
_ELSEWHERE = {("export lora", "output_dir"), ("export lora", "gguf")}


def test_every_output_is_in_the_table():
    """A new option for an output must be locked, and tested here."""
    found = set()

    def walk(command, words):
        for name, child in getattr(command, "commands", {}).items():
            walk(child, [*words, name])
        found.update((" ".join(words), parameter.name) for parameter in command.params if parameter.name in _OUTPUTS)

    walk(typer.main.get_command(build_app()), [])
    assert found == {*_CALLS, *_ELSEWHERE}


@pytest.mark.parametrize("key", _CALLS, ids=" ".join)
def test_the_second_command_is_refused(key, braces, tmp_path, monkeypatch, adapter_dir):
    """Exit code 2 with the other process, before any work; nothing is written."""
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text('{"text": "the film is good", "label": "positive"}\n')
    args, output = _CALLS[key]
    recipe = braces("recipe", "list", "--format", "json").json[0]["name"]
    args = [arg.replace("RECIPE", recipe) for arg in args]
    with output_lock(Path(output.replace("RECIPE", recipe))):
        before = sorted(tmp_path.rglob("*"))
        outcome = braces(*args)
        assert outcome.code == 2, outcome.err
        assert "another braces command is writing there (process " in outcome.err
        assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("key", ["train", "eval", "attr-build", "merge", "export code"])
def test_no_command_writes_into_its_inputs(key, braces, tmp_path, monkeypatch, adapter_dir, model_dir):
    """A folder in the adapter's, and the folder of its base, also with --overwrite; nothing is written."""
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text('{"text": "the film is good"}\n')
    args, _ = _CALLS[key, "output_dir"]
    args = [arg.replace("perplexity", "arc_easy") for arg in args[: args.index("--output-dir")]]
    args += () if "--adapter" in args else ("--adapter", adapter_dir)
    before = names(adapter_dir), names(model_dir)
    for output in (adapter_dir / "out", model_dir):
        outcome = braces(*args, "--output-dir", output, "--overwrite")
        assert outcome.code == 2, outcome.err
        assert "overlaps the input" in outcome.err
    assert (names(adapter_dir), names(model_dir)) == before


def test_every_export_locks(tmp_path):
    """Every export uses `new_folder`."""
    with new_folder(tmp_path / "out", False) as folder:
        (folder / "a").touch()
        with pytest.raises(ConfigError, match="another"), new_folder(tmp_path / "out", True):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_was_filled_meanwhile_is_not_replaced(tmp_path):
    """By a program without locks."""
    folder = new_folder(tmp_path / "out", False)
    (folder.__enter__() / "a").touch()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "other").touch()
    with pytest.raises(ConfigError, match="not empty"):
        folder.__exit__(None, None, None)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "other"]
