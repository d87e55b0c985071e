"""Small numeric functions that several rooms need. Light: only the standard library."""

from __future__ import annotations

import math
import re


def safe_exp(value: float) -> float:
    """e to the power of `value`; infinity where that exceeds a float, as with the perplexity of a broken model."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def whole_number(text: str) -> int | None:
    """The number that text of up to 18 digits says, None for any other text.

    `str.isdigit` takes "²" as well, and `int` the digits of every script but no more than 4,300 of them.
    """
    return int(text) if re.fullmatch("[0-9]{1,18}", text) else None
