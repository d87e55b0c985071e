"""Numeric functions at the ends of what a float holds."""

from __future__ import annotations

import math

from braces_cli.core.utils.numbers import safe_exp


def test_safe_exp_is_exp_and_never_overflows():
    assert safe_exp(1.5) == math.exp(1.5)
    assert safe_exp(709.0) == math.exp(709.0)
    assert safe_exp(710.0) == safe_exp(math.inf) == math.inf
    assert safe_exp(-math.inf) == 0.0
    assert math.isnan(safe_exp(math.nan))
