"""README, pages and recipes show commands that the command line accepts, and links that lead somewhere."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer

from braces_cli.cli.main import build_app
from braces_cli.cli.recipe import recipes

ROOT = Path(__file__).resolve().parents[1]
# Written from the code itself, and held to it by tests of their own.
GENERATED = {"COMMANDS.md", "ARCHITECTURES.md"}
DOCS = sorted(page for page in (ROOT / "recipes" / "docs").glob("*.md") if page.name not in GENERATED)
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "recipes" / "train" / "README.md", *DOCS]
# What stands in front of a command of ours where a launcher starts it.
_LAUNCHED = re.compile(r"^(?:torchrun|accelerate launch|python)\b.*?-m braces_cli ")


def commands(text: str) -> Iterator[str]:
    """Commands of `braces` in code blocks and between backticks, their continued lines joined."""
    joined = re.sub(r"\\\n\s*(?:#\s+)?", "", text)
    for line in joined.splitlines():
        if line.startswith(("    ", "# ")):
            shown = re.sub(r"^(?:\s+|# (?:Copy|Run|Then)\s+|#\s+)(?:\$ )?", "", line)
            launched = _LAUNCHED.match(shown)
            shown = f"braces {shown[launched.end() :]}" if launched else shown
            if shown.startswith("braces "):
                yield shown
    # In the text, `braces train` alone is the command's name, and `--help` ends the process that parses it.
    prose = "\n".join(line for line in joined.splitlines() if not line.startswith("    "))
    yield from (found for found in re.findall(r"`(braces [^`]+)`", prose) if " --" in found and "--help" not in found)


def sources() -> Iterator[Any]:
    for page in PAGES:
        for shown in commands(page.read_text(encoding="utf-8")):
            yield pytest.param(shown, id=f"{page.name}: {shown}")
    for name, text in recipes().items():
        for shown in commands(text):
            yield pytest.param(shown, id=f"{name}: {shown}")


@cache
def root() -> Any:
    """The group of all commands."""
    return typer.main.get_command(build_app())


def parse(shown: str) -> Any:
    """Parse a command as the command line does, without running it."""
    words = shlex.split(shown, comments=True)[1:]
    # In prose `...` stands for the options that are not spelled out.
    words = [word for word in words if word != "..."]
    command = root()
    context: Any = typer.Context(command, info_name="braces")
    while hasattr(command, "commands") and words and not words[0].startswith("-"):
        name = words.pop(0)
        assert name in command.commands, f"no command `{name}`"
        command = command.commands[name]
    return command.make_context(command.name, words, parent=context)


@pytest.mark.parametrize("shown", list(sources()))
def test_a_command_that_is_shown_is_accepted(shown, tmp_path, monkeypatch):
    """Its name, options and values; the recipes that it names lie in the current folder."""
    monkeypatch.chdir(tmp_path)
    for name, text in recipes().items():
        (tmp_path / f"{name}.yaml").write_text(text, encoding="utf-8")
    (tmp_path / "train.yaml").write_text("rank: 8\n", encoding="utf-8")
    parse(shown)


@pytest.mark.parametrize(
    "shown", ["braces trian", "braces train --nope 1", "braces train --rank many", "braces steer --s"]
)
def test_a_command_that_is_wrong_is_seen(shown):
    """Or the test above would prove nothing."""
    with pytest.raises((AssertionError, typer.TyperException)):
        parse(shown)


def test_every_form_of_a_command_is_extracted():
    text = """
    braces one --a \\
        --b
    torchrun --nproc-per-node 2 -m braces_cli two --c
    $ braces three  # a note
`braces four --d` and `braces five`
# Run       braces six --e \\
#               --f
"""
    assert list(commands(text)) == [
        "braces one --a --b",
        "braces two --c",
        "braces three  # a note",
        "braces six --e --f",
        "braces four --d",
    ]


def test_the_readme_has_the_five_commands_and_those_of_the_gate():
    shown = list(commands((ROOT / "README.md").read_text(encoding="utf-8")))
    assert [line.split()[1] for line in shown] == ["demo", "train", "eval", "steer", "inspect", "merge"]
    readme, gate = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", ".ci/run"))
    for line in ("pip install -e .", "pip install -e '.[test]'", "python -m pytest"):
        assert f"    {line}\n" in readme
        assert line.removeprefix("pip install") in gate
    assert "braces demo --output-dir" in gate
    assert len(readme.splitlines()) <= 120


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page):
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    missing = [target for target in targets if ":" not in target and not (page.parent / target).exists()]
    assert missing == []
