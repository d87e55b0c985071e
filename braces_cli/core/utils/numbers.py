"""Small numeric functions that several rooms need. Light: only the standard library."""

from __future__ import annotations

import math


def safe_exp(value: float) -> float:
    """e to the power of `value`; infinity where that exceeds a float, as with the perplexity of a broken model."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
