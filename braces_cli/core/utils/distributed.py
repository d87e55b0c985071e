"""Which of several processes this is, as torchrun and `accelerate launch` tell it, and how they agree.

Everything works in a lone process too, where each question has its trivial answer.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
R = TypeVar("R")


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


@dataclass(frozen=True)
class Processes:
    """This process among those that share work.

    Attributes:
        rank: number of this process, from 0.
        size: number of processes.
        accelerator: of accelerate, which lm-eval needs; None for a lone process, and where nothing needs it.
    """

    rank: int = 0
    size: int = 1
    accelerator: Any = None

    @property
    def first(self) -> bool:
        """Whether this is the process that collects the results."""
        return self.rank == 0

    def share_out(self, items: Sequence[T], work: Callable[[list[T]], Sequence[R]]) -> list[R]:
        """Do `work` on every `size`-th item, and return the results of all processes in the order of `items`.

        Args:
            work: returns one result for each item, in order.
        """
        results: list[R] = [None] * len(items)  # type: ignore[list-item]
        for rank, part in enumerate(self.gather(list(work(list(items[self.rank :: self.size]))))):
            results[rank :: self.size] = part
        return results

    def gather(self, value: Any) -> list[Any]:
        """`value` of every process, on every process."""
        return [value] if self.size == 1 else gathered(value)


# No other process.
ALONE = Processes()


def join_all(device: torch.device) -> Processes:
    """Meet the other processes, as `join` does, to share work out among all; a lone process meets nobody."""
    join(device)
    return Processes(rank(), world_size())


def join_with_accelerator(cpu: bool) -> Processes:
    """Meet the other processes over accelerate, which lm-eval needs; a lone process meets nobody."""
    if world_size() == 1:
        return Processes()
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    # One process may have many more long texts than another; none may give up waiting.
    timeout = InitProcessGroupKwargs(timeout=timedelta(weeks=1))
    accelerator = Accelerator(cpu=cpu, kwargs_handlers=[timeout])
    return Processes(accelerator.process_index, accelerator.num_processes, accelerator)
