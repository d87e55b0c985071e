"""Values of options: whatever they are, a parser returns its type or says which option is wrong."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import strategies as st

from braces_cli.cli.main import build_app, main
from braces_cli.cli.options import help_of
from braces_cli.core.attributes.options import parse_strengths
from braces_cli.core.errors import ConfigError
from braces_cli.core.models.options import parse_ranges
from braces_cli.data.rows import Columns, parse_columns
from braces_cli.evaluation.settings import parse_thresholds
from braces_cli.inspection.clamp import Clamp, parse_clamp
from braces_cli.training.settings import parse_opposites
from tests.fuzz.budget import attempt, fuzz
from tests.fuzz.inputs import PLAIN

PARTS = [
    "0", "1", "7", "-", "--", ",", ":", "=", ".", "p", "nan", "inf", "1e9", "1e-9", "-1", "9" * 5000, "²", "٣", "x",
    " ", "text", "prompt", "completion", "a", "b", "perplexity", "\x00", "\x1b[31m", "\n", "+", "_", "0x1",
]  # fmt: skip
VALUES = st.lists(st.sampled_from(PARTS), max_size=6).map("".join) | PLAIN
PARSERS: dict[str, Callable[[str], Any]] = {
    "ranges": lambda text: parse_ranges(text, 8, "--layers"),
    "strengths": parse_strengths,
    "columns": lambda text: parse_columns([text]),
    "thresholds": lambda text: parse_thresholds([text]),
    "clamp": parse_clamp,
    "opposites": lambda text: parse_opposites([text]),
}


@fuzz(
    st.sampled_from(sorted(PARSERS)),
    VALUES,
    examples=(
        ("ranges", "²"), ("ranges", "0-²"), ("ranges", "9" * 5000), ("clamp", f"0:{'9' * 5000}=1"), ("clamp", "²:0=1"),
        ("clamp", "0:1=pnan"), ("strengths", "0:1e9:1e-9"), ("strengths", "nan:1:1"), ("strengths", "0:inf:1"),
        ("thresholds", "a:b=nan"), ("columns", "text=a,text=b"), ("opposites", "a:b:c"),
    ),
)  # fmt: skip
def test_parsers_of_values(name: str, text: str) -> None:
    value, error = attempt(lambda: PARSERS[name](text), ConfigError)
    if error:
        assert error.message
        assert error.where
        return
    if name == "ranges":
        assert value == sorted(set(value))
        assert all(0 <= index < 8 for index in value)
    elif name == "strengths":
        assert value
        assert all(math.isfinite(s) for s in value)
    elif name == "clamp":
        assert isinstance(value, Clamp)
        assert math.isfinite(value.value)
    elif name == "columns":
        assert isinstance(value, Columns)


def _flags(command: str) -> list[str]:
    """The options of a command that take a value, but for those that need what a dry run would load."""
    found = help_of(build_app([command]), [command])
    assert found is not None
    taken = [p for p in found[0].params if not getattr(p, "is_flag", False) and p.opts[0].startswith("--")]
    return sorted(p.opts[0] for p in taken if p.name not in ("config", "model", "adapter", "data"))


FLAGS = [(command, flag) for command in ("attr-build", "eval", "merge", "steer") for flag in _flags(command)]


@fuzz(
    st.sampled_from(FLAGS),
    VALUES,
    examples=(
        (("eval", "--batch-size"), "9" * 5000), (("eval", "--batch-size"), "²"), (("steer", "--top-p"), "nan"),
        (("steer", "--s"), "inf"), (("steer", "--seed"), "9" * 5000), (("merge", "--output-dir"), "a\x00b"),
        (("eval", "--attributes"), "a\x00b"), (("steer", "--layers"), "\x1b[31m"), (("eval", "--limit"), ""),
    ),
)  # fmt: skip
def test_any_value_of_any_option(option: tuple[str, str], value: str) -> None:
    """A dry run takes it or refuses it as a wrong option, with one line of `Error:`."""
    command, flag = option
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as ended:
        main([command, "--dry-run", f"{flag}={value}"])
    errors = [line for line in err.getvalue().split("\n") if line.startswith("Error:")]
    assert (ended.value.code, len(errors)) in ((0, 0), (2, 1)), err.getvalue()[:500]


def test_options_are_found() -> None:
    assert len(FLAGS) > 50
    assert ("eval", "--batch-size") in FLAGS
