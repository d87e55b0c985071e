"""Ranges of numbers as options give them, such as `--layers 8-20,24` or `1-`."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from braces_cli.core.errors import ConfigError
from braces_cli.core.text import whole_number

if TYPE_CHECKING:
    from torch import nn


def parse_ranges(text: str, count: int, option: str) -> list[int]:
    """Indices of `8-20,24` or `1-` (inclusive, from 0) among `count`, in order.

    Raises:
        ConfigError: not a list of ranges, or beyond what there is.
    """
    chosen: set[int] = set()
    for part in (part.strip() for part in text.split(",")):
        first, dash, last = part.partition("-")
        low = whole_number(first)
        high = low if not dash else whole_number(last) if last else count - 1
        if low is None or high is None:
            raise ConfigError(f"`{part}` is neither a number nor a range", where=option, hint="Such as 8-20,24 or 1-.")
        if low > high or high >= count:
            raise ConfigError(f"`{part}` is out of range", where=option, hint=f"The range is 0 to {count - 1}.")
        chosen.update(range(low, high + 1))
    return sorted(chosen)


def format_ranges(indices: Collection[int]) -> str:
    """Indices as `parse_ranges` reads them, such as `8-20,24`."""
    runs: list[list[int]] = []
    for index in sorted(indices):
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def chosen_layers(model: nn.Module, text: str | None) -> list[int] | None:
    """Decoder layers of a `--layers` option; None, which is all, where it was not given."""
    from braces_cli.core.models.ffn import layer_stack

    return None if text is None else parse_ranges(text, len(layer_stack(model)[1]), "--layers")
