"""Parameters that lie in pieces on several processes (FSDP2), whole while something outside the model reads them.

What an attribute adds is computed before the forward pass, from parameters that FSDP gathers only while their own layer
runs. So the pass reads whole copies, and their gradients go back into the pieces behind the backward pass: averaged
over the processes, as FSDP does with those of the layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class GatheredParameters:
    """Whole copies of parameters for one optimizer step."""

    def __init__(self) -> None:
        self._copies: dict[Any, Tensor] = {}

    def full_tensor(self, parameter: Any) -> Tensor:
        """`parameter` itself where it is whole, else a copy with gradients, the same until `settle`.

        Every process must ask for the same parameters in the same order.
        """
        if not hasattr(parameter, "full_tensor"):
            result: Tensor = parameter
            return result
        if not torch.is_grad_enabled():
            return parameter.detach().full_tensor()
        if parameter not in self._copies:
            copy = parameter.detach().full_tensor().requires_grad_(parameter.requires_grad)
            self._copies[parameter] = copy
        return self._copies[parameter]

    def scatter_gradients(self) -> None:
        """Add the gradients of the copies to those of the parameters, and forget the copies."""
        from torch.distributed.tensor import DTensor, Partial

        for parameter, copy in self._copies.items():
            # A process whose batches had no row contributes nothing, but must take part.
            gradient = torch.zeros_like(copy) if copy.grad is None else copy.grad
            mesh, placements = parameter.device_mesh, parameter.placements
            parts = DTensor.from_local(gradient, mesh, [Partial("avg")] * mesh.ndim, run_check=False)
            shard = parts.redistribute(mesh, placements)
            parameter.grad = shard if parameter.grad is None else parameter.grad + shard
        self._copies = {}
