"""`braces demo`: the commands that it prints and runs. tests/e2e runs the complete demo."""

from __future__ import annotations

import sys
from typing import Any

from braces_cli.cli.demo import Guide


def test_a_step_is_the_command_that_it_prints(model_dir: Any, tmp_path: Any) -> None:
    """The model card contains the command of the step, not that of the demo."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "the film is good"}\n' * 4)
    said: list[str] = []
    before = list(sys.argv)
    guide = Guide(tmp_path, 0, said.append)
    settings = ("--data", rows, "--rank", "2", "--max-steps", "1", "--device", "cpu")
    result = guide.run("Train", "train", "--model", model_dir, *settings, "--output-dir", tmp_path / "out")
    assert result["trainable_parameters"] == 2 * (2 * 32 + 1)
    assert guide.steps[0]["command"] in "".join(said)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "    braces train --model " in card
    assert "--max-steps 1" in card
    assert sys.argv == before


def test_a_dry_run_prints_and_runs_nothing(tmp_path: Any) -> None:
    """Commands that could not run are only listed."""
    said: list[str] = []
    guide = Guide(tmp_path, 0, said.append, dry_run=True)
    assert guide.run("Train", "train", "--model", "nowhere") is None
    assert "braces train --model nowhere" in "".join(said)
