"""How much memory a run took."""

from __future__ import annotations

import resource
import sys

import torch


def reset_memory() -> None:
    """Forget the peak so far, where that can be done."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_memory() -> int:
    """Bytes: of the GPU where there is one, else of the whole process (which `ru_maxrss` counts in KiB on Linux)."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
