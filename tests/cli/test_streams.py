"""Standard streams that are full or whose reader has gone; names that a terminal would obey."""

from __future__ import annotations

import ast
import io
import json
import os
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from braces_cli.cli.output import print_pairs, print_table
from braces_cli.cli.steer import TextPrinter, print_rows, print_texts

ROOT = Path(__file__).resolve().parents[2]
HOSTILE = {
    "colours": "\x1b[31mred\x1b[0m",
    "title": "\x1b]0;title\x07",
    "c1": "\x9b2J\x85",
    "forged line": "a\nError: all is well\r\n",
    "right to left": "a\u202etxt.exe\u2066",
    "separators": "a\u2028b\u2029c",
    "half a character": "a\ud800b",
    "markup": "[/red] [red]x [link=file:///a]y[/link] [@click=f]",
    "emoji code": ":smile: :warning:",
    "backspaces": "a\b\b\x7f",
    "long": "x" * 5000,
    "long lines": "y\n" * 3000,
}


def shown(text: str) -> set[str]:
    """Characters of an output that a terminal may obey."""
    bidi = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
    return {c for c in text if c in bidi or (unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") and c != "\n")}


def call(*args: str, redirect: str = "", **environment: str) -> subprocess.CompletedProcess[bytes]:
    """`braces ARGS` in a process of its own, below a shell that redirects its streams."""
    line = f'exec "$0" -m braces_cli "$@" {redirect}'
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(["bash", "-c", line, sys.executable, *args], capture_output=True, env=env, check=False)


@pytest.mark.parametrize("fmt", ["table", "json"])
@pytest.mark.parametrize(
    ("redirect", "reason"),
    [
        (">/dev/full", "No space left on device"),
    ],
)
def test_a_result_that_cannot_be_written_is_an_error(fmt: str, redirect: str, reason: str) -> None:
    """Exit 1 and two lines that name the stream: nobody takes an empty file for a result."""
    done = call("recipe", "list", "--format", fmt, redirect=redirect)
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr.decode().startswith(f"Error: standard output: {reason}\n")
    assert len(done.stderr.splitlines()) == 2


@pytest.mark.parametrize("redirect", ["2>/dev/full", "</dev/null 2>/dev/full"])
def test_the_other_streams_are_not_needed(redirect: str) -> None:
    """A command that has nothing to read or to say there does its work."""
    done = call("recipe", "list", "--format", "json", redirect=redirect)
    assert (done.returncode, done.stderr) == (0, b"")
    assert json.loads(done.stdout)


@pytest.mark.parametrize(
    ("args", "redirect", "code"),
    [
        (["recipe", "copy", "nope"], "2>/dev/full", 2),
        (["recipe", "copy", "nope", "--format", "json"], ">/dev/full", 2),
        (["recipe", "list", "--help"], ">/dev/full", 1),
        (["recipe", "list"], "| true", 0),
    ],
)
def test_errors_keep_their_exit_code_where_nobody_hears_them(args: list[str], redirect: str, code: int) -> None:
    """And no traceback is left for the streams that are open."""
    done = call(*args, redirect=redirect)
    assert done.returncode == code
    text = (done.stdout + done.stderr).decode()
    assert "Traceback" not in text
    assert "Exception ignored" not in text


@pytest.mark.parametrize("settings", [{"PYTHONIOENCODING": "latin-1"}, {"LC_ALL": "C"}])
def test_streams_are_utf8(settings: dict[str, str]) -> None:
    """Whatever the environment says."""
    name = "é☃日"
    done = call("recipe", "copy", name, "--format", "json", **settings)
    assert done.returncode == 2
    assert f"`{name}`" in json.loads(done.stdout.decode())["error"]["message"]
    assert "Traceback" not in done.stderr.decode()


def test_too_little_memory_is_said_in_two_lines() -> None:
    """Where even torch cannot be loaded."""
    line = 'ulimit -v 400000; exec "$0" -m braces_cli env'
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["bash", "-c", line, sys.executable], capture_output=True, env=env, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("Error: ")
    assert len(done.stderr.splitlines()) == 2
    assert "fault of braces" not in done.stderr


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes")])
def test_no_memory_is_no_fault_of_ours(braces: Any, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Whether Python or a library finds out."""
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    outcome = failing(braces, monkeypatch, error)
    assert outcome.code == 1
    assert outcome.err.startswith("Error: out of memory\n")


def test_an_error_of_the_system_without_a_name_is_no_fault_of_ours(
    braces: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = failing(braces, monkeypatch, OSError(28, "No space left on device"))
    assert (outcome.code, outcome.err.splitlines()[0]) == (1, "Error: No space left on device")


def failing(braces: Any, monkeypatch: pytest.MonkeyPatch, error: Exception) -> Any:
    """The outcome of a command in which `error` is raised."""

    def fail() -> None:
        raise error

    monkeypatch.setattr("braces_cli.cli.recipe.recipes", fail)
    return braces("recipe", "list")


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


# Some of these load a model, so that each gets all of the short names in one, and a long one.
_ALL = "".join(name for name in HOSTILE.values() if len(name) < 100 and "\ud800" not in name)


@pytest.mark.parametrize(
    ("place", "name"),
    [
        *(("recipe", name) for name in HOSTILE.values() if "\ud800" not in name),
        *((place, name) for place in CALLS for name in (_ALL, HOSTILE["long lines"])),
    ],
    ids=lambda value: value if value in CALLS else f"{value.encode('ascii', 'backslashreplace').decode()[:12]!r}",
)
def test_a_name_can_do_nothing_to_the_terminal(
    braces: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, place: str, name: str
) -> None:
    """Wherever it stands: an error of two lines of bounded length, without a control character, and not our fault."""
    monkeypatch.chdir(tmp_path)
    outcome = braces(*(word.replace("{}", name) for word in CALLS[place]))
    assert outcome.code in (1, 2, 3, 4), outcome.err
    assert not shown(outcome.out + outcome.err)
    errors = [line for line in outcome.err.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1
    assert len("".join(outcome.err.splitlines(keepends=True)[-2:])) < 1000
    assert "fault of braces" not in outcome.err


@pytest.mark.parametrize("kind", HOSTILE)
def test_json_says_the_name_exactly(braces: Any, kind: str) -> None:
    """Without a control character in the document."""
    name = HOSTILE[kind]
    outcome = braces("recipe", "copy", name, "--format", "json")
    assert not shown(outcome.out)
    if kind != "half a character":  # no argument can hold one
        assert name in outcome.json["error"]["message"]


@pytest.mark.parametrize("kind", HOSTILE)
def test_tables_show_names_as_they_are(capsys: pytest.CaptureFixture[str], kind: str) -> None:
    """In titles, headers, cells and pairs: no markup is read, no code becomes a picture."""
    name = HOSTILE[kind]
    print_table(name, [name, "b"], [[name, 1], ["x", None]])
    print_pairs(name, {"a": name, "list": [name, name]}, {"a": name})
    out = capsys.readouterr().out
    assert not shown(out)
    if kind in ("markup", "emoji code"):
        assert out.count(name) == 8


@pytest.mark.parametrize("kind", HOSTILE)
def test_generated_text_keeps_its_lines_and_nothing_else(capsys: pytest.CaptureFixture[str], kind: str) -> None:
    """Line breaks and tabs are text; all other control characters are escaped; nothing is cut."""
    text = f"{HOSTILE[kind]}\n\tend"
    row = {"prompt": text, "text": text, "unsteered": text, "attributes": {"positive": 1.0}}
    print_rows([row])
    print_texts([row])
    flow = TextPrinter()
    flow.run([row])
    out = capsys.readouterr().out
    assert shown(out) <= {"\t"}
    assert out.count("\n\tend") == 6
    if kind in ("markup", "emoji code", "long"):
        assert out.count(HOSTILE[kind]) == 6


def test_one_place_prints() -> None:
    """`print`, stdout and stderr are used in two files; the rest of the package goes through them."""
    package = ROOT / "braces_cli"
    # lm-eval's own command line with our model in it.
    allowed = {
        package / "cli" / "console.py",
        package / "cli" / "streams.py",
        package / "evaluation" / "lm_eval_model.py",
    }
    for path in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            prints = name in ("print", "sys.stdout.write", "sys.stderr.write", "rich.print", "traceback.print_exc")
            assert not prints or path in allowed, f"{path}:{node.lineno}"


def test_lines_of_a_conversation_that_are_no_text_are_bad_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit 3, as where prompts are read."""
    from braces_cli.cli.steer import _lines
    from braces_cli.core.errors import DataError

    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe\n"), encoding="utf-8"))
    with pytest.raises(DataError, match="not UTF-8"):
        list(_lines())


def test_a_line_of_a_conversation_that_is_too_long_is_skipped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With an error; the lines around it are answered."""
    from braces_cli.cli.steer import _lines

    monkeypatch.setattr("braces_cli.steering.prompts.LONGEST", 10)
    monkeypatch.setattr("sys.stdin", io.StringIO("first\n" + "x" * 35 + "\n\n/quit"))
    assert list(_lines()) == ["first\n", "\n", "/quit"]
    assert capsys.readouterr().err.splitlines() == [
        "Error: standard input: a line of more than 10 characters",
        "It is skipped.",
    ]
