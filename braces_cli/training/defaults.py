"""Defaults of training that were found by measurement (recipes/RESULTS.md), and those that follow from others."""

from __future__ import annotations

import math

DEFAULT_RANK = 16
# A step of Adam turns R by about lr sqrt(d), so this product is held constant, and the rate follows from the width d.
DEFAULT_TURN = 0.16
BASELINE_LR = 1e-3
# With the contrastive loss, gates that move too fast close before they have found their direction.
DEFAULT_GATE_LR, DEFAULT_GATE_LR_ATTRIBUTES = 0.3, 0.1


def default_lr(width: int) -> float:
    """The peak learning rate of the projections for a model of d = `width`, to three digits."""
    return float(f"{DEFAULT_TURN / math.sqrt(width):.3g}")


def capped_warmup(steps: int, max_steps: int) -> int:
    """Steps of the warm-up of a run: as set, but no more than a quarter of all, so that the peak rate is reached."""
    return min(steps, max_steps // 4)
