"""Several processes on one evaluation (torchrun, accelerate launch): each measures its share of the documents.

lm-eval shards by the rank and world size of its model, which it sets for a model it has loaded itself and leaves at one
process for a model given to it; `harness` sets them from here. Results come together on the first process.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

from braces_cli.core.models.load_options import LoadOptions
from braces_cli.core.utils.errors import ConfigError

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Processes:
    """This process among all: `rank` of `size`; `accelerator` is None where it is alone."""

    rank: int = 0
    size: int = 1
    accelerator: Any = None

    @property
    def first(self) -> bool:
        """Whether this is the process that results come together on."""
        return self.rank == 0

    def share_out(self, items: Sequence[T], work: Callable[[list[T]], Sequence[R]]) -> list[R]:
        """Do `work` on every `size`-th item, and return the results of all processes in the order of `items`.

        Args:
            work: one result an item, in order.
        """
        mine = list(work(list(items[self.rank :: self.size])))
        found: list[R] = [None] * len(items)  # type: ignore[list-item]
        for rank, part in enumerate(self.gather(mine)):
            found[rank :: self.size] = part
        return found

    def gather(self, value: Any) -> list[Any]:
        """`value` of every process, on every process."""
        if self.size == 1:
            return [value]
        import torch.distributed

        parts: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(parts, value)
        return parts


ALONE = Processes()


def rank() -> int:
    """Rank of this process, before anything is set up."""
    return int(os.environ.get("RANK", "0"))


def join(options: LoadOptions) -> tuple[Processes, LoadOptions]:
    """Join the other processes, and put the base on this process's own device.

    Raises:
        ConfigError: several processes and a base spread over several devices.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ALONE, options
    if options.device_map is not None:
        hint = "Start one process, or leave --device-map out."
        raise ConfigError("a base on several devices cannot be copied to each process", where="--device-map", hint=hint)
    import torch
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    on_cpu = options.device == "cpu" or (options.device == "auto" and not torch.cuda.is_available())
    # One process may have many more long texts than another; none may give up waiting.
    patient = InitProcessGroupKwargs(timeout=timedelta(weeks=1))
    accelerator = Accelerator(cpu=on_cpu, kwargs_handlers=[patient])
    if not on_cpu and options.device in ("auto", "cuda"):
        options = replace(options, device=str(accelerator.device))
    return Processes(accelerator.process_index, accelerator.num_processes, accelerator), options
