"""SECURITY.md names the test of each promise, and these tests exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
NAMED = sorted(set(re.findall(r"`(tests/[\w/.]+)::(\w+)`", PAGE)))


@pytest.mark.parametrize(("file", "name"), NAMED)
def test_a_named_test_exists(file: str, name: str) -> None:
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_each_promise_has_its_test() -> None:
    """But for one, which only says what a command is for."""
    promises = PAGE.partition("## What is promised")[2].partition("## What is not promised")[0]
    without = [item for item in re.split(r"^- ", promises, flags=re.MULTILINE)[1:] if "::test_" not in item]
    assert [item.partition("`")[2].partition("`")[0] for item in without] == ["braces export code"]
    assert len(NAMED) > 15
