"""Progress where stderr is no terminal: a line every so often."""

from __future__ import annotations

import logging

import pytest

from braces_cli.cli.console import progress
from braces_cli.cli.progress_lines import ProgressLines


def test_a_line_is_written_when_it_is_due() -> None:
    """With the share that is done and what is left, at the speed of this stage."""
    now = [0.0]
    lines: list[str] = []
    report = ProgressLines(lines.append, interval=30, clock=lambda: now[0])
    for step in range(1, 101):
        now[0] += 1
        report(f"training: loss {step}", step, 1000)
    assert len(lines) == 3
    assert lines[0] == "training: loss 30, 30 of 1,000 (3%), about 970 s left"
    report("scoring", 5, None)
    assert len(lines) == 3
    now[0] += 30
    report("scoring", 8, None)
    assert lines[3] == "scoring, 8 done in 30 s"


def test_what_an_earlier_run_has_done_says_nothing_about_the_speed() -> None:
    """A resumed run."""
    now = [0.0]
    lines: list[str] = []
    report = ProgressLines(lines.append, interval=10, clock=lambda: now[0])
    report("training", 900, 1000)
    now[0] = 10
    report("training", 950, 1000)
    assert lines == ["training, 950 of 1,000 (95%), about 10 s left"]


@pytest.mark.parametrize("quiet", [False, True])
def test_quiet_is_silent(quiet: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """And without it the lines go through the log."""
    monkeypatch.setattr("braces_cli.cli.progress_lines.INTERVAL", 0.0)
    monkeypatch.setattr(ProgressLines.__init__, "__defaults__", (0.0, *ProgressLines.__init__.__defaults__[1:]))
    monkeypatch.setattr(logging.getLogger("braces"), "propagate", True)
    with caplog.at_level(logging.INFO, logger="braces"), progress(quiet) as report:
        report("training", 1, 2)
    assert bool(caplog.messages) is not quiet
