"""README, pages and recipes: commands that the command line accepts, links and names of files and tests that exist."""

import ast
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer

from braces_cli.cli import options
from braces_cli.cli.main import build_app
from braces_cli.cli.recipe import recipes
from braces_cli.core.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "braces_cli"
# Generated from the code; other tests compare them.
GENERATED = {"COMMANDS.md", "ARCHITECTURES.md"}
DOCS = sorted(page for page in (ROOT / "recipes" / "docs").glob("*.md") if page.name not in GENERATED)
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "recipes" / "train" / "README.md", *DOCS]
ARCHITECTURE = ROOT / "recipes" / "docs" / "ARCHITECTURE.md"
SECURITY = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
_LAUNCHED = re.compile(r"^(?:torchrun|accelerate launch|python)\b.*?-m braces_cli ")
# A file or a folder between backticks; a module after `python -m`.
_PATH = re.compile(r"`([\w./-]+(?:\.(?:py|md|yaml)|/))`")
_MODULE = re.compile(r"python -m (tests\.[\w.]+)")


def commands(text: str) -> Iterator[str]:
    """Commands of `braces` in code blocks and between backticks, with continued lines joined."""
    joined = re.sub(r"\\\n\s*(?:#\s+)?", "", text)
    for line in joined.splitlines():
        if line.startswith(("    ", "# ")):
            shown = re.sub(r"^(?:\s+|# (?:Copy|Run|Then)\s+|#\s+)(?:\$ )?", "", line)
            launched = _LAUNCHED.match(shown)
            shown = f"braces {shown[launched.end() :]}" if launched else shown
            if shown.startswith("braces "):
                yield shown
    # In prose, `braces train` alone is the name of a command.
    prose = "\n".join(line for line in joined.splitlines() if not line.startswith("    "))
    yield from (found for found in re.findall(r"`(braces [^`]+)`", prose) if " --" in found and "--help" not in found)


def sources() -> Iterator[Any]:
    texts = {page.name: page.read_text(encoding="utf-8") for page in PAGES} | recipes()
    for name, text in texts.items():
        yield from (pytest.param(shown, id=f"{name}: {shown}") for shown in commands(text))


@cache
def root() -> Any:
    """The group of all commands."""
    return typer.main.get_command(build_app())


class Accepted(Exception):
    """Settings were built."""


def accept(shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parse a command and build its settings, without running it."""
    build = options.build

    def stop(*args: Any, **kwargs: Any) -> None:
        build(*args, **kwargs)
        raise Accepted

    monkeypatch.setattr(options, "build", stop)
    # `...` in prose is for options that are not written out.
    words = [word for word in shlex.split(shown, comments=True)[1:] if word != "..."]
    try:
        root()(words, prog_name="braces", standalone_mode=False)
    except Accepted:
        return
    except ConfigError as error:
        if "..." not in shown or "missing" not in error.message:
            raise


@pytest.mark.parametrize("shown", list(sources()))
def test_documented_command_is_accepted(shown, tmp_path, monkeypatch):
    """Its name, options and values; the recipes that it names are in the current folder."""
    monkeypatch.chdir(tmp_path)
    for name, text in recipes().items():
        (tmp_path / f"{name}.yaml").write_text(text, encoding="utf-8")
    (tmp_path / "train.yaml").write_text("data: rows.jsonl\noutput_dir: out\n", encoding="utf-8")
    (tmp_path / "lokr.json").write_text('{"peft_type": "LOKR"}', encoding="utf-8")
    (tmp_path / "attrs").mkdir()
    (tmp_path / "attrs" / "calm.safetensors").touch()
    accept(shown, monkeypatch)


@pytest.mark.parametrize(
    "shown", ["braces trian", "braces train --nope 1", "braces train --rank many", "braces steer --s"]
)
def test_wrong_command_is_not_accepted(shown, monkeypatch):
    """Control of the test above."""
    with pytest.raises((ConfigError, typer.TyperException)):
        accept(shown, monkeypatch)


def test_commands_are_extracted():
    text = """
    braces one --a \\
        --b
    torchrun --nproc-per-node 2 -m braces_cli two --c
    $ braces three  # a note
`braces four --d` and `braces five`
# Run       braces six --e \\
#               --f
"""
    expected = ["one --a --b", "two --c", "three  # a note", "six --e --f", "four --d"]
    assert list(commands(text)) == [f"braces {line}" for line in expected]


def test_readme_has_the_main_commands_and_those_of_the_gate():
    readme, gate = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", ".ci/run"))
    called = [line.split()[1] for line in commands(readme)]
    assert called == ["demo", "train", "eval", "steer", "inspect", "merge", "steer"]
    for line in ("pip install -e .", "pip install -e '.[test]'", "python -m pytest"):
        assert f"    {line}\n" in readme
        assert line.removeprefix("pip install") in gate
    assert "braces demo --output-dir" in gate
    assert len(readme.splitlines()) <= 120


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page):
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    assert [target for target in targets if ":" not in target and not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", [ARCHITECTURE, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_named_files_exist(page):
    """Relative to the root or to the package."""
    text = page.read_text(encoding="utf-8")
    names = set(_PATH.findall(text)) | {f"{module.replace('.', '/')}.py" for module in _MODULE.findall(text)}
    assert len(names) > 5
    assert {name for name in names if not (ROOT / name).exists() and not (PACKAGE / name).exists()} == set()


def test_architecture_page_lists_every_module():
    """Each module of the package has a line, and each line has a module."""
    listed, folder = set(), ""
    for line in ARCHITECTURE.read_text(encoding="utf-8").split("```")[1].splitlines():
        name = line.split()[0] if line else ""
        if name.endswith("/"):
            folder = name
        elif name:
            listed.add((folder if line.startswith(" ") else "") + name)
    modules = {path.relative_to(PACKAGE).with_suffix("").as_posix() for path in PACKAGE.rglob("*.py")}
    assert listed == {module for module in modules if not module.endswith(("__init__", "__main__"))}


def test_security_page_names_the_tests_of_each_promise():
    """The tests exist; one item describes a command and has no test."""
    named = set(re.findall(r"`(tests/[\w/.]+)::(\w+)`", SECURITY))
    assert len(named) > 15
    for file in {file for file, _ in named}:
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        assert {name for each, name in named if each == file} <= functions, file
    promises = SECURITY.partition("## What is promised")[2].partition("## What is not promised")[0]
    without = [item for item in re.split(r"^- ", promises, flags=re.MULTILINE)[1:] if "::test_" not in item]
    assert [item.partition("`")[2].partition("`")[0] for item in without] == ["braces export code"]
