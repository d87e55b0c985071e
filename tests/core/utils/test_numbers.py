"""Numeric functions at the ends of what a float holds."""

from __future__ import annotations

import math

import pytest

from braces_cli.core.text import safe_exp, whole_number


def test_safe_exp_is_exp_and_never_overflows():
    assert safe_exp(1.5) == math.exp(1.5)
    assert safe_exp(709.0) == math.exp(709.0)
    assert safe_exp(710.0) == safe_exp(math.inf) == math.inf
    assert safe_exp(-math.inf) == 0.0
    assert math.isnan(safe_exp(math.nan))


@pytest.mark.parametrize("text", ["", "²", "٣", "-1", "+1", "1.0", "1_0", " 1", "1\n", "9" * 19, "9" * 5000, "x"])
def test_other_text_is_no_whole_number(text):
    assert whole_number(text) is None


def test_whole_number_reads_digits():
    assert [whole_number(text) for text in ("0", "007", "9" * 18)] == [0, 7, 10**18 - 1]
