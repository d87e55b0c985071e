"""Results on stdout, progress on stderr."""

from __future__ import annotations

import logging
import re

import pytest

from braces_cli.cli.output import file_size, print_pairs, print_table, progress


def test_nothing_is_wrapped_where_stdout_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """A pipe gets each row on one line."""
    print_table("", ["a", "b"], [["x", "word " * 100]])
    assert "word " * 99 in capsys.readouterr().out


def test_pairs_leave_out_what_is_empty(capsys: pytest.CaptureFixture[str]) -> None:
    """None, empty lists and tuples; lists are joined and labels used."""
    print_pairs("", {"a": None, "b": (), "c": [], "d": {}, "e_f": [1, 2], "g": 0}, {"g": "zero"})
    shown = capsys.readouterr().out
    assert "e f" in shown
    assert "1, 2" in shown
    assert "zero" in shown
    assert not re.search(r"\b[abcd]\b", shown)


def test_sizes_have_units() -> None:
    """No bare bytes."""
    assert [file_size(n) for n in (0, 999, 12_345, 1_234_567_890)] == ["0 bytes", "999 bytes", "12.3 kB", "1.23 GB"]


@pytest.mark.parametrize("quiet", [False, True])
def test_progress_goes_to_the_log_without_a_terminal(
    quiet: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A quiet command logs none of it."""
    monkeypatch.setattr("braces_cli.cli.output._SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setattr(logging.getLogger("braces"), "propagate", True)
    with caplog.at_level(logging.INFO, logger="braces"), progress(quiet) as report:
        report("training", 1, 2)
    assert caplog.messages == ([] if quiet else ["training, 1 of 2"])
