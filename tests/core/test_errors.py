"""First line of an error of a library."""

from __future__ import annotations

import pytest

from braces_cli.core.errors import first_line


@pytest.mark.parametrize(
    ("text", "line"),
    [("one\ntwo", "one"), ("\n  \n  two \nthree", "two"), ("", "ValueError"), (" \n", "ValueError"), ("x" * 9, "xxxx")],
)
def test_the_first_line_that_is_not_blank(text, line):
    assert first_line(ValueError(text), 4 if text.startswith("x") else 200) == line
