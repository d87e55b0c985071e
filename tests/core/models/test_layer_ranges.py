"""Ranges in `--layers`, `--index` and `--positions`."""

from __future__ import annotations

import pytest

from braces_cli.core.errors import ConfigError
from braces_cli.core.models.options import format_ranges, parse_ranges


@pytest.mark.parametrize(
    ("text", "expected"), [("8-10,2", [2, 8, 9, 10]), ("30-", [30, 31]), ("0", [0]), (" 1 , 1-2 ", [1, 2])]
)
def test_ranges(text, expected):
    """Inclusive, from 0, open ends, any order."""
    assert parse_ranges(text, 32, "--layers") == expected


@pytest.mark.parametrize("text", ["", "a", "32", "5-2", "-3", "1-x", "0-99"])
def test_ranges_that_are_none(text):
    """Out of range and unreadable alike."""
    with pytest.raises(ConfigError):
        parse_ranges(text, 32, "--layers")


@pytest.mark.parametrize(("layers", "text"), [([], ""), ([2], "2"), ([3, 1, 2], "1-3"), ([1, 3, 4, 5], "1,3-5")])
def test_indices_are_written_as_they_are_read(layers, text):
    """The shortest list of ranges."""
    assert format_ranges(layers) == text
    assert not text or parse_ranges(text, 32, "--layers") == sorted(layers)
