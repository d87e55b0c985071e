"""Settings from the command line, a YAML file and Python: conversion, precedence and the places in errors."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer

from braces_cli.cli.options import command
from braces_cli.core.config import OTHER_NAMES, build, format_ranges, matching_setting, option, parse_ranges
from braces_cli.core.errors import ConfigError
from braces_cli.core.options import DisplaySettings
from tests.cli.reference import command_of


@dataclass(frozen=True, kw_only=True)
class Some(DisplaySettings):
    """One setting of each type, two of them positional.

    Attributes:
        name: Who,
            in two lines.
    """

    required = ("out",)

    name: str = option("ada", metavar="NAME", argument=True)
    words: tuple[str, ...] = option((), metavar="WORD", argument=True)
    rank: int | None = option(None, min=1)
    lr: float = option(1.0, above=0, max=10)
    s: tuple[float, ...] = option(())
    resume: bool = option(False)
    chat: bool | None = option(None, flag="--chat/--no-chat")
    packing: str = option("auto", choices=("auto", "on", "off"))
    layers: str | None = option(None)
    columns: tuple[str, ...] = option((), metavar="KEY=COLUMN,...")
    data: tuple[str, ...] = option(())
    stop: tuple[str, ...] = option((), min=1)
    adapter: str | None = option(None, once=True)
    folder: Path | None = option(None, flag="--directory")
    out: str | None = option("here")


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("rank", "8", 8),
        ("rank", np.int64(8), 8),
        ("rank", 8.0, 8),
        ("rank", None, None),
        ("lr", "1e-3", 0.001),
        ("lr", ".5", 0.5),
        ("lr", 1, 1.0),
        ("lr", np.float32(0.5), 0.5),
        ("s", ["-1.5", 2], (-1.5, 2.0)),
        ("s", 2, (2.0,)),
        ("resume", "yes", True),
        ("resume", "false", False),
        ("resume", True, True),
        ("packing", "off", "off"),
        ("layers", 3, "3"),
        ("layers", range(2, 5), "2,3,4"),
        ("layers", np.arange(2), "0,1"),
        ("layers", torch.bfloat16, "bfloat16"),
        ("layers", torch.device("cuda", 1), "cuda:1"),
        ("columns", "a=b", ("a=b",)),
        ("columns", {"prompt": "question"}, ("prompt=question",)),
        ("columns", ["a=b", Path("c")], ("a=b", "c")),
        ("columns", None, ()),
        ("folder", "out", Path("out")),
        ("folder", Path("out"), Path("out")),
        ("directory", "out", Path("out")),
    ],
)
def test_a_value_is_converted_to_the_type_of_the_setting(name: str, value: Any, wanted: Any) -> None:
    found = getattr(build(Some, {name: value}, python=True), "folder" if name == "directory" else name)
    assert found == wanted
    assert type(found) is type(wanted)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("rank", "many", "rank: `many` is not a whole number of at least 1"),
        ("rank", 0, "rank: 0 is not a whole number of at least 1"),
        ("rank", 3.7, "3.7 is not a whole number"),
        ("rank", True, "True is not a whole number"),
        ("lr", 10**400, "is not a number"),
        ("lr", None, "None is not a number of more than 0 and at most 10"),
        ("lr", "nan", "`nan` is not a number"),
        ("s", ["1", "inf"], "is not a number"),
        ("resume", 2, "is not true or false"),
        ("packing", "of", "`of` is not one of auto, on, off\nDid you mean off"),
        ("layers", [], "[] is not text"),
        ("adapter", ["a", "b"], "is not text\nIt takes one value."),
        ("data", [{"text": "a"}], "is not text\nWrite rows into a file"),
        ("stop", "", "`` is not text"),
        ("folder", 3, "is not a path"),
        ("folder", "a\0b", "null character"),
        ("out", None, "--out: missing option"),
        ("learning_rate", 1.0, "no setting `learning_rate`\nUse `lr`."),
        ("reusme", True, "Did you mean resume"),
    ],
)
def test_other_values_and_names_are_refused(name: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        build(Some, {name: value}, python=True)
    assert message in str(error.value)


@pytest.fixture
def call() -> Any:
    """Run a command with arguments and return its settings."""
    received: list[Some] = []

    @command
    def example(settings: Some) -> None:
        """Show the settings."""
        received.append(settings)

    app = typer.Typer()
    app.command()(example)

    def run(*args: str) -> Some:
        app(args=list(args), standalone_mode=False)
        return received[-1]

    return run


def test_the_command_line_has_precedence_over_a_file_and_defaults(call: Any, tmp_path: Path) -> None:
    path = tmp_path / "some.yaml"
    path.write_text("name: eva\nrank: 3\nlr: 2\nlayers:\nchat: no\ndata: a\ns: [1, 2]\nadapter: [x]\n")
    found = call("--rank", "4", "--config", str(path), "bob", "one", "--data", "b", "--data", "c", "two")
    assert (found.name, found.words, found.rank, found.lr, found.data) == ("bob", ("one", "two"), 4, 2.0, ("b", "c"))
    assert (found.s, found.layers, found.chat, found.adapter, found.resume) == ((1.0, 2.0), None, False, "x", False)
    sources = {"rank": "command line", "lr": "file", "name": "command line", "adapter": "file"}
    assert sources.items() <= dict(found.given).items()
    assert "layers" not in found.given
    assert call("--config", str(path)).name == "eva"
    assert call("--chat").chat is True
    with pytest.raises(ConfigError, match=r"--adapter: .*is not text"):
        call("--adapter", "a", "--adapter", "b")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rnak: 4", "some.yaml: unknown key `rnak`\nDid you mean rank"),
        ("learning-rate: 4", "Use `lr`."),
        ("rank: many", "some.yaml: rank: `many` is not a whole number"),
        ("rank: [1, 2]", "some.yaml: rank: "),
        ("layers: {a: 1}", "some.yaml: layers: "),
        ("rank: 1\nrank: 2", "some.yaml:2: `rank` is named twice"),
        ("dry-run: 1\nlog_level: 2", "unknown key"),
    ],
)
def test_an_error_in_a_file_names_file_and_key(call: Any, tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "some.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        call("--config", str(path))
    assert message in str(error.value)


def test_the_home_folder_is_expanded_in_every_path(call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell does not expand `--folder=~/x` and values in YAML."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "some.yaml").write_text("directory: ~/y\n")
    assert call("--directory=~/x").folder == tmp_path / "x"
    assert call("--config", "~/some.yaml").folder == tmp_path / "y"


def test_names_in_other_tools_suggest_an_option() -> None:
    """Each name suggests an option of a command and is not an option."""
    known: set[str] = set()
    for name in ("train", "steer", "eval", "merge"):
        known |= {flag.lstrip("-").replace("-", "_") for p in command_of(name).params for flag in p.opts}
    for names in OTHER_NAMES.values():
        for name in names.split():
            assert name not in known
            assert matching_setting(name, known) in known


@pytest.mark.parametrize("option", ["-ngl", "-np", "-fa"])
def test_a_group_of_letters_is_not_an_option(braces: Any, option: str) -> None:
    """The parser names the first letter only; these options of llama.cpp have no counterpart."""
    outcome = braces("steer", option, "9", "--prompt", "a")
    assert outcome.code == 2
    assert "here it is" not in outcome.err
    assert "here it is --max-new-tokens" in braces("steer", "-n", "9", "--prompt", "a").err
    assert "here it is --max-new-tokens" in braces("steer", "--n_predict=9", "--prompt", "a").err


@pytest.mark.parametrize(
    ("text", "expected"), [("8-10,2", [2, 8, 9, 10]), ("30-", [30, 31]), ("0", [0]), (" 1 , 1-2 ", [1, 2])]
)
def test_ranges_are_inclusive(text, expected):
    assert parse_ranges(text, 32, "--layers") == expected


@pytest.mark.parametrize("text", ["", "a", "32", "5-2", "-3", "1-x", "0-99"])
def test_other_ranges_are_refused(text):
    with pytest.raises(ConfigError):
        parse_ranges(text, 32, "--layers")


@pytest.mark.parametrize(("layers", "text"), [([], ""), ([2], "2"), ([3, 1, 2], "1-3"), ([1, 3, 4, 5], "1,3-5")])
def test_indices_round_trip(layers, text):
    assert format_ranges(layers) == text
    assert not text or parse_ranges(text, 32, "--layers") == sorted(layers)
