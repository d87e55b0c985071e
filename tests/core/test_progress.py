"""Times of the stages of a command."""

from __future__ import annotations

import logging

from braces_cli.core.progress import Timings


def test_stages_are_listed_in_order(caplog, monkeypatch):
    """With the time outside of all stages; stages that run twice add up; only at level DEBUG."""
    clock = iter([0.0, 1.0, 3.0, 3.0, 4.0, 4.0, 4.5, 10.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    monkeypatch.setattr(logging.getLogger("braces"), "propagate", True)
    timings = Timings()
    for name in ("rows", "weights", "rows"):
        with timings.stage(name):
            pass
    with caplog.at_level(logging.INFO, "braces"):
        timings.log("before")
    assert caplog.text == ""
    with caplog.at_level(logging.DEBUG, "braces"):
        timings.log("before")
    lines = [line.split() for line in caplog.records[-1].getMessage().splitlines()[1:]]
    assert lines == [
        ["rows", "2.500", "s"], ["weights", "1.000", "s"], ["everything", "else", "6.500", "s"],
        ["in", "all", "10.000", "s"],
    ]  # fmt: skip
    assert timings.runs == {"rows": 2, "weights": 1}
