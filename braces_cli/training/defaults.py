"""Defaults of training that were found by measurement (recipes/RESULTS.md), and those that follow from others."""

from __future__ import annotations

import math

DEFAULT_FORM, DEFAULT_FORM_ATTRIBUTES = "whitened", "paper"
# Where value vectors do not span the width, as those of small experts.
FORM_OF_NARROW_EXPERTS = "untied"
# At equal parameters, hence half the rank where there are two projections.
_RANK, _RANKS = 16, {"untied": 8, "whitened": 8}
# A step of Adam turns R by about lr sqrt(d), so this product is held constant, and the rate follows from the width d.
DEFAULT_TURN = {"paper": 0.16, "signed": 0.32, "untied": 0.32, "whitened": 0.32}
BASELINE_LR = 1e-3
# Of the gates of `paper`. With the contrastive loss, gates that move too fast close before they have found their
# direction.
DEFAULT_GATE_LR, DEFAULT_GATE_LR_ATTRIBUTES = 0.3, 0.1
# Of the coefficients of the other forms.
DEFAULT_COEFFICIENT_LR = 0.1


def default_rank(form: str) -> int:
    """The rank of a form, or of a baseline, where none is named."""
    return _RANKS.get(form, _RANK)


def default_lr(form: str, width: int) -> float:
    """The peak learning rate of a form's projections for a model of d = `width`, to three digits."""
    return float(f"{DEFAULT_TURN[form] / math.sqrt(width):.3g}")


def capped_warmup(steps: int, max_steps: int) -> int:
    """Steps of the warm-up of a run: as set, but no more than a quarter of all, so that the peak rate is reached."""
    return min(steps, max_steps // 4)
