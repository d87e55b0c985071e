"""A settings dataclass as a command: positional arguments, and the words of the command that runs."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass
from typing import Any

import pytest
import typer

from braces_cli.cli.command import command, command_line, running
from braces_cli.core.utils.settings import Settings, flag_of, option


@dataclass(frozen=True, kw_only=True)
class ExampleSettings(Settings):
    """Two arguments, the second one repeatable, and an option."""

    count: int = option(1, help="How often.", min=1)
    name: str = option(help="Who.", metavar="NAME", argument=True)
    words: tuple[str, ...] = option((), help="What.", metavar="WORD", argument=True)


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
