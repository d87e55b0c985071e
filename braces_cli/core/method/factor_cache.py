"""The factors of a relevance module, kept from one forward pass to the next while nothing they depend on changes."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable

import torch
from torch import Tensor

from braces_cli.core.models.value_weights import Values


class FactorCache:
    """(A, B) of each value matrix and dtype.

    One rule says when they are stale: when any parameter has another version or another device than at the time of the
    last call, or `clear` was called, all of them are computed anew.
    """

    def __init__(self) -> None:
        self._factors: dict[tuple[Hashable, torch.dtype], tuple[Tensor, Tensor]] = {}
        self._state: tuple | None = None

    def factors(
        self,
        parameters: Iterable[Tensor],
        values: Values,
        dtype: torch.dtype,
        compute: Callable[[], tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor]:
        """What is kept for `values` in `dtype`, or `compute()`, kept from now on."""
        state = tuple((parameter._version, parameter.device) for parameter in parameters)
        if self._state != state:
            self._factors, self._state = {}, state
        key = (values.data_ptr() if isinstance(values, Tensor) else values.key, dtype)
        if key not in self._factors:
            self._factors[key] = compute()
        return self._factors[key]

    def clear(self) -> None:
        """Forget everything: for changes that no version counter shows."""
        self._state = None
