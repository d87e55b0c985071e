"""`braces steer` on terminals and in pipes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

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
