"""What a user sees of an error that a library raised."""

from __future__ import annotations

import pytest

from braces_cli.core.errors import first_line


@pytest.mark.parametrize(
    ("text", "line"),
    [("one\ntwo", "one"), ("\n  \n  two \nthree", "two"), ("", "ValueError"), (" \n", "ValueError"), ("x" * 9, "xxxx")],
)
def test_the_first_line_that_says_something(text, line):
    assert first_line(ValueError(text), 4 if text.startswith("x") else 200) == line
