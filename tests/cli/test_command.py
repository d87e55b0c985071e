"""A settings dataclass as a command: positional arguments, and the words of the command that runs."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer

from braces_cli.cli.options import command, command_line, running
from braces_cli.core.config import Settings, flag_of, option
from braces_cli.core.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ExampleSettings(Settings):
    """Two arguments, the second one repeatable, and an option."""

    count: int = option(1, help="How often.", min=1)
    name: str = option(help="Who.", metavar="NAME", argument=True)
    words: tuple[str, ...] = option((), help="What.", metavar="WORD", argument=True)
    adapter: str | None = option(None, help="One.", once=True)
    data: tuple[str, ...] = option((), help="Many.")
    folder: Path | None = option(None, help="Where.")


@pytest.fixture
def call() -> Any:
    """Runs the example command with arguments; gives its settings."""
    received: list[ExampleSettings] = []

    @command
    def example(settings: ExampleSettings) -> None:
        """Show the settings."""
        received.append(settings)

    app = typer.Typer()
    app.command()(example)

    def run(*args: str) -> ExampleSettings:
        app(args=list(args), standalone_mode=False)
        return received[-1]

    return run


def test_arguments_are_taken_by_position(call: Any) -> None:
    """In the order of the fields, options anywhere."""
    settings = call("ada", "one", "--count", "2", "two")
    assert (settings.name, settings.words, settings.count) == ("ada", ("one", "two"), 2)
    assert settings.given == {"name": "command line", "words": "command line", "count": "command line"}
    assert call("ada").words == ()
    assert flag_of(ExampleSettings, "name") == "NAME"


def test_a_file_names_arguments_like_options(call: Any, tmp_path: Any) -> None:
    """The command line wins there, too."""
    path = tmp_path / "example.yaml"
    path.write_text("name: ada\ncount: 3\n")
    assert call("--config", str(path)).name == "ada"
    assert call("bob", "--config", str(path)).name == "bob"


def test_a_command_that_runs_others_names_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside `running` the words are those given, outside those that the process was started with."""
    monkeypatch.setattr(sys, "argv", ["/bin/braces", "demo"])
    assert command_line() == ["braces", "demo"]
    with contextlib.suppress(ValueError), running(["braces", "train"]):
        assert command_line() == ["braces", "train"]
        raise ValueError
    assert command_line() == ["braces", "demo"]


def test_an_option_of_one_value_refuses_a_second_one(call: Any, tmp_path: Any) -> None:
    """Rather than drop the first without a word; from a file, too."""
    assert call("ada", "--adapter", "a").adapter == "a"
    assert call("ada").adapter is None
    with pytest.raises(ConfigError, match="--adapter: given 2 times"):
        call("ada", "--adapter", "a", "--adapter", "b")
    path = tmp_path / "example.yaml"
    path.write_text("adapter: [a, b]\n")
    with pytest.raises(ConfigError, match="given 2 times"):
        call("ada", "--config", str(path))


def test_a_file_gives_a_repeatable_option_one_value_or_a_list(call: Any, tmp_path: Any) -> None:
    """And an option of one value no list."""
    path = tmp_path / "example.yaml"
    path.write_text("data: rows.jsonl\n")
    assert call("ada", "--config", str(path)).data == ("rows.jsonl",)
    path.write_text("data: [a.jsonl, b.jsonl]\n")
    assert call("ada", "--config", str(path)).data == ("a.jsonl", "b.jsonl")
    path.write_text("count: [1, 2]\n")
    with pytest.raises(ConfigError, match="`count` takes one value, not a list") as caught:
        call("ada", "--config", str(path))
    assert caught.value.where == str(path)


@pytest.mark.parametrize("text", ["count: 1\nname: ada\ncount: 2\n", "data: a\nname: ada\ndata: c\n"])
def test_a_key_that_comes_twice_is_an_error(call: Any, tmp_path: Any, text: str) -> None:
    """With file and line."""
    path = tmp_path / "example.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="is named twice"):
        call("--config", str(path))


def test_the_home_folder_is_expanded_wherever_a_path_comes_from(call: Any, tmp_path: Any, monkeypatch: Any) -> None:
    """`--folder=~/x` and a value in YAML are expanded by no shell."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert call("ada", "--folder=~/x").folder == tmp_path / "x"
    path = tmp_path / "example.yaml"
    path.write_text("folder: ~/y\n")
    assert call("ada", "--config", str(path)).folder == tmp_path / "y"
