"""Which of several processes this is, as torchrun and `accelerate launch` tell it, and how they agree.

Everything works in a lone process too, where each question has its trivial answer.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def rank() -> int:
    """Number of this process, from 0."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process is the one that writes and prints."""
    return rank() == 0


def local_rank() -> int | None:
    """Number of this process on its machine, which is that of its accelerator; None in a lone process."""
    return int(os.environ.get("LOCAL_RANK", "0")) if world_size() > 1 else None


def join(device: torch.device) -> None:
    """Meet the other processes, over gloo on a CPU, over what the accelerator has otherwise."""
    if world_size() > 1:
        from accelerate import PartialState

        PartialState(cpu=device.type == "cpu")


def gathered(value: Any) -> list[Any]:
    """The values of all processes in the order of their rank; every process must ask."""
    if world_size() == 1:
        return [value]
    from torch.distributed import all_gather_object

    values: list[Any] = [None] * world_size()
    all_gather_object(values, value)
    return values


def whole(tensor: Any) -> Any:
    """A parameter as a plain tensor: where it lies in pieces on several processes (FSDP2), every one must ask."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def barrier() -> None:
    """Wait until every process has come here."""
    gathered(None)
