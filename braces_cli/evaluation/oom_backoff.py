"""Halve a batch size that does not fit into memory, warn, and continue, so that no evaluation is lost to it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from braces_cli.core.utils.errors import BracesError

logger = logging.getLogger("braces")

T = TypeVar("T")


def halving(work: Callable[[int], T], size: int, stage: str) -> tuple[T, int]:
    """Call `work` with a batch size, and with half of it each time that memory does not suffice.

    Returns:
        What `work` returned, and the batch size that fitted.

    Raises:
        BracesError: not even one sequence at a time fits.
    """
    while True:
        try:
            return work(size), size
        except (RuntimeError, MemoryError) as error:
            if not isinstance(error, MemoryError) and not should_reduce_batch_size(error):
                raise
            if size == 1:
                hint = "Load the base in fewer bits (--dtype bfloat16, --quantize bnb-4bit) or on several devices."
                raise BracesError("out of memory with one sequence at a time", where=stage, hint=hint) from error
        # Beyond the except clause, whose traceback holds on to the very tensors that did not fit.
        clear_device_cache(garbage_collection=True)
        logger.warning("%s: out of memory with %d sequences a pass, going on with %d", stage, size, size // 2)
        size //= 2
