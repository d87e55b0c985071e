"""`braces steer` on terminals and in pipes."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from braces_cli.cli.steer import TextPrinter, print_rows, print_texts
from braces_cli.core.errors import DataError
from tests.cli.test_output import HOSTILE, controls

ROOT = Path(__file__).resolve().parents[2]
LINES = ["the film is", "a day"]


def test_results_go_to_a_redirected_stdout_while_a_bar_is_drawn(model_dir):
    """stderr a terminal and stdout a file, as in `braces steer ... > texts.jsonl`."""
    import pty

    master, slave = pty.openpty()
    argv = ["steer", "--model", str(model_dir), "--device", "cpu", "--max-new-tokens", "8", "--prompt", "a day"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    run = subprocess.Popen(
        [sys.executable, "-m", "braces_cli", *argv], stdout=subprocess.PIPE, stderr=slave, env=environment, text=True
    )
    os.close(slave)
    shown = b""
    try:
        while piece := os.read(master, 4096):
            shown += piece
    except OSError:  # the other end is closed
        pass
    out = run.communicate()[0]
    assert run.returncode == 0
    assert json.loads(out)["prompt"] == "a day"
    assert b"generating" in shown
    assert b"prompt" not in shown


def test_one_text_at_a_time_is_printed_as_it_is_generated(session, capsys):
    """The prompt, then the text; the same as in a row."""
    from braces_cli.cli.steer import TextPrinter
    from braces_cli.core.options import Sampling
    from braces_cli.steering.texts import generate_rows, text_requests

    rows = list(generate_rows(session, text_requests(LINES), Sampling(8)))
    flow, pieces = TextPrinter(), []

    def write(request, piece):
        pieces.append(piece)
        flow.write(request, piece)

    flow.run(generate_rows(session, text_requests(LINES), Sampling(8), batch_size=1, stream=write))
    assert capsys.readouterr().out == "".join(f"{row['prompt']}{row['text']}\n\n" for row in rows)
    assert len(pieces) > 4


def test_a_reader_who_leaves_early_is_no_error(braces, model_dir, monkeypatch):
    """`| head -1`, whether the JSON or the table finds out."""
    import sys as system

    class Gone:
        """A pipe that nobody reads."""

        encoding = "utf-8"

        def write(self, text):
            raise BrokenPipeError(32, "Broken pipe")

        def flush(self):
            raise BrokenPipeError(32, "Broken pipe")

        def isatty(self):
            return False

    for fmt in ("json", "table"):
        monkeypatch.setattr(system, "stdout", Gone())
        outcome = braces("steer", "--model", model_dir, "--prompt", "a day", "--max-new-tokens", 2, "--format", fmt)
        assert (outcome.code, outcome.err) == (0, "")


@pytest.mark.parametrize("kind", HOSTILE)
def test_generated_text_keeps_its_lines(capsys: pytest.CaptureFixture[str], kind: str) -> None:
    """Other control characters are escaped; nothing is cut."""
    text = f"{HOSTILE[kind]}\n\tend"
    row = {"prompt": text, "text": text, "unsteered": text, "attributes": {"positive": 1.0}}
    print_rows([row])
    print_texts([row])
    TextPrinter().run([row])
    out = capsys.readouterr().out
    assert controls(out) <= {"\t"}
    assert out.count("\n\tend") == 6
    if kind in ("markup", "emoji code", "long"):
        assert out.count(HOSTILE[kind]) == 6


def test_texts_alone_go_into_a_pipe(braces: Any, model_dir: Path) -> None:
    """`--format text`: each prompt with its continuation; `-` reads prompts from the pipe."""
    call = ("steer", "--model", model_dir, "--prompts", "-", "--max-new-tokens", 4, "--device", "cpu")
    rows = braces(*call, "--format", "json", stdin="the film is\na day\n").lines
    shown = braces(*call, "--format", "text", stdin="the film is\na day\n")
    assert shown.out == "".join(f"{row['prompt']}{row['text']}\n\n" for row in rows)
    assert braces(*call, "--format", "text", "--show-unsteered", stdin="a\n").code == 2
    table = braces(*call, "--format", "table", stdin="the film is\na day\n").out
    assert f"prompt: {rows[0]['prompt']}" in table


def test_a_built_in_list_instead_of_a_file_is_reported(braces: Any, model_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "attributes"
    braces("attr-build", "--model", model_dir, "--attribute", "warm", "--words", "good", "--output-dir", folder)
    call = ("steer", "--model", model_dir, "--prompt", "a", "--max-new-tokens", 2, "--attributes", folder)
    assert "its built-in word list is used" in braces(*call, "--attribute", "positive").err
    assert "built-in" not in braces(*call, "--attribute", "warm").err


def test_conversation_lines_that_are_not_text_are_bad_data(monkeypatch: pytest.MonkeyPatch) -> None:
    from braces_cli.cli.steer import _lines

    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe\n"), encoding="utf-8"))
    with pytest.raises(DataError, match="not UTF-8"):
        list(_lines())


def test_a_conversation_line_that_is_too_long_is_skipped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With an error; the lines before and after it are answered."""
    from braces_cli.cli.steer import _lines

    monkeypatch.setattr("braces_cli.steering.prompts.LONGEST", 10)
    monkeypatch.setattr("sys.stdin", io.StringIO("first\n" + "x" * 35 + "\n\n/quit"))
    assert list(_lines()) == ["first\n", "\n", "/quit"]
    assert "standard input: a line of more than 10 characters" in capsys.readouterr().err
