"""Results on stdout and progress on stderr, with names that a terminal could interpret."""

import ast
import logging
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from braces_cli.cli.output import print_pairs, print_table, print_text, progress

PACKAGE = Path(__file__).resolve().parents[2] / "braces_cli"
HOSTILE = {
    "colours": "\x1b[31mred\x1b[0m",
    "title": "\x1b]0;title\x07",
    "c1": "\x9b2J\x85",
    "forged line": "a\nError: all is well\r\n",
    "right to left": "a\u202etxt.exe\u2066",
    "separators": "a\u2028b\u2029c",
    "lone surrogate": "a\ud800b",
    "markup": "[/red] [red]x [link=file:///a]y[/link] [@click=f]",
    "emoji code": ":smile: :warning:",
    "backspaces": "a\b\b\x7f",
    "long": "x" * 5000,
    "long lines": "y\n" * 3000,
}
# The short names in one argument; an argument cannot contain a surrogate.
ALL = "".join(name for name in HOSTILE.values() if len(name) < 100 and "\ud800" not in name)
CALLS = {
    "recipe": ["recipe", "copy", "{}"],
    "config": ["recipe", "list", "--config", "{}"],
    "option": ["recipe", "list", "--{}"],
    "command": ["{}"],
    "model": ["steer", "--prompt", "a", "--model", "{}"],
    "adapter": ["inspect", "--adapter", "{}"],
    "attribute": ["steer", "--prompt", "a", "--attribute", "{}"],
    "data": ["train", "--data", "{}", "--output-dir", "out"],
    "folder": ["train", "--data", "none.txt", "--output-dir", "{}"],
    "prompts": ["steer", "--prompts", "{}"],
    "attributes": ["steer", "--prompt", "a", "--attribute", "positive", "--attributes", "{}"],
    "scorer": ["steer", "--sweep", "-1:1:1", "--attribute", "positive", "--prompt", "a", "--scorer", "{}"],
}


def controls(text: str) -> set[str]:
    """Return the characters that a terminal can interpret, except line breaks."""
    bidi = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
    return {c for c in text if c in bidi or (unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") and c != "\n")}


@pytest.mark.parametrize("place", CALLS)
def test_a_name_in_an_error_is_escaped_and_cut(braces, monkeypatch, tmp_path, place):
    """In every argument: one error of two lines of bounded length."""
    monkeypatch.chdir(tmp_path)
    for name in (ALL, HOSTILE["long lines"]):
        outcome = braces(*(word.replace("{}", name) for word in CALLS[place]))
        assert outcome.code in (1, 2, 3, 4), outcome.err
        assert not controls(outcome.out + outcome.err)
        assert [line[:7] for line in outcome.err.splitlines()].count("Error: ") == 1
        assert len("".join(outcome.err.splitlines(keepends=True)[-2:])) < 1000
        assert "fault of braces" not in outcome.err


@pytest.mark.parametrize("kind", [kind for kind in HOSTILE if kind != "lone surrogate"])
def test_json_contains_the_exact_name(braces: Any, kind: str) -> None:
    outcome = braces("recipe", "copy", HOSTILE[kind], "--format", "json")
    assert not controls(outcome.out)
    assert HOSTILE[kind] in outcome.json["error"]["message"]


@pytest.mark.parametrize("kind", HOSTILE)
def test_tables_and_texts_show_names_as_they_are(capsys: pytest.CaptureFixture[str], kind: str) -> None:
    """No markup and no emoji code is interpreted; text keeps line breaks and tabs."""
    name = HOSTILE[kind]
    print_table(name, [name, "b"], [[name, 1], ["x", None]])
    print_pairs(name, {name: name, "list": [name, name]})
    out = capsys.readouterr().out
    assert not controls(out)
    if kind in ("markup", "emoji code"):
        assert out.count(name) == 8
    print_text(f"{name}\n\tend")
    out = capsys.readouterr().out
    assert controls(out) == {"\t"}
    assert out.endswith("\n\tend\n")


@pytest.mark.parametrize("quiet", [False, True])
def test_progress_is_logged_without_a_terminal(quiet, monkeypatch, caplog):
    monkeypatch.setattr("braces_cli.cli.output._SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setattr(logging.getLogger("braces"), "propagate", True)
    with caplog.at_level(logging.INFO, logger="braces"), progress(quiet) as report:
        report("training", 1, 2)
    assert set(caplog.messages) == set([] if quiet else ["training, 1 of 2"])


def test_one_module_prints() -> None:
    """Except lm-eval's command line with the model of braces."""
    allowed = {"cli/output.py", "evaluation/lm_eval_model.py"}
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            prints = name in ("print", "sys.stdout.write", "sys.stderr.write", "rich.print", "traceback.print_exc")
            assert not prints or str(path.relative_to(PACKAGE)) in allowed, f"{path}:{node.lineno}"
