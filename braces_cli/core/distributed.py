"""The processes of a launch (torchrun, accelerate launch) and signals. Everything also works in a single process."""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from braces_cli.core.errors import ConfigError

if TYPE_CHECKING:
    import torch

_LAUNCH = "Launchers set it (torchrun, accelerate launch; recipes/launch). To run one process, unset it."
_SIGNALS = (signal.SIGINT, signal.SIGTERM)

T = TypeVar("T")
R = TypeVar("R")


def check_variables() -> None:
    """Check the variables of a launcher; delete empty ones, which libraries would parse as numbers.

    Raises:
        ConfigError: a variable is not a number, is missing, or RANK is not below WORLD_SIZE.
    """
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        text = os.environ.get(name, "0").strip()
        if not text:
            del os.environ[name]
        elif not re.fullmatch(r"\d{1,9}", text, re.ASCII):
            raise ConfigError(f"`{text}` is not a number", where=name, hint=_LAUNCH)
    if rank() >= world_size():
        raise ConfigError(f"{rank()} is not below WORLD_SIZE, {world_size()}", where="RANK", hint=_LAUNCH)
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if world_size() > 1 else ():
        if not os.environ.get(name):
            raise ConfigError(f"is not set, and WORLD_SIZE is {world_size()}", where=name, hint=_LAUNCH)


def rank() -> int:
    """Return the number of this process, from 0."""
    return int(os.environ.get("RANK") or 0)


def world_size() -> int:
    """Return the number of processes."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def is_main() -> bool:
    """Return True for the process that writes and prints."""
    return rank() == 0


@dataclass(frozen=True)
class Processes:
    """This process among the processes that share work.

    Attributes:
        rank: number of this process, from 0.
        size: number of processes.
        accelerator: accelerate's, for lm-eval; None for a single process.
    """

    rank: int = 0
    size: int = 1
    accelerator: Any = None

    @property
    def first(self) -> bool:
        """Return True for the process that collects the results."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """Return `value` of every process, on every process."""
        return [value] if self.size == 1 else gathered(value)

    def share_out(self, items: Sequence[T], work: Callable[[list[T]], Sequence[R]]) -> list[R]:
        """Apply `work` to every `size`-th item, and return the results of all processes in the order of `items`.

        Args:
            work: returns one result per item, in order.
        """
        results: list[R] = [None] * len(items)  # type: ignore[list-item]
        for number, part in enumerate(self.gather(list(work(list(items[self.rank :: self.size]))))):
            results[number :: self.size] = part
        return results


ALONE = Processes()


def join(device: torch.device, with_accelerator: bool = False) -> Processes:
    """Connect the processes of a launch: gloo on a CPU, else the accelerator's backend."""
    if world_size() == 1:
        return ALONE
    from accelerate import Accelerator, PartialState
    from accelerate.utils import InitProcessGroupKwargs

    with ExitStack() as stack:
        # torch waits for the other processes in C++, where Python handlers do not run: signals end the process then.
        for number in _SIGNALS:
            stack.callback(signal.signal, number, signal.signal(number, signal.SIG_DFL))
        if not with_accelerator:
            PartialState(cpu=device.type == "cpu")
            return Processes(rank(), world_size())
        # One process may have many more long texts than another.
        timeout = InitProcessGroupKwargs(timeout=timedelta(weeks=1))
        accelerator = Accelerator(cpu=device.type == "cpu", kwargs_handlers=[timeout])
    return Processes(rank(), world_size(), accelerator)


def gathered(value: Any) -> list[Any]:
    """Return the values of all processes by rank. Collective: call on every rank."""
    if world_size() == 1:
        return [value]
    from torch.distributed import all_gather_object

    values: list[Any] = [None] * world_size()
    all_gather_object(values, value)
    return values


def full_tensor(tensor: Any) -> Any:
    """Gather a parameter that FSDP2 has sharded. Collective: call on every rank."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def barrier() -> None:
    """Wait for all processes. Collective: call on every rank."""
    gathered(None)


class StopRequest:
    """The signal that requested a stop; `number` is 0 without a request."""

    number = 0


@contextmanager
def deferred() -> Iterator[StopRequest]:
    """Record the first SIGINT or SIGTERM instead of handling it; a second signal is handled at once."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request  # only the main thread receives signals
        return
    restore = ExitStack()

    def record(number: int, frame: Any) -> None:
        request.number = number
        restore.close()

    with restore:
        for number in _SIGNALS:
            # A shell starts background jobs with SIGINT ignored.
            if signal.getsignal(number) != signal.SIG_IGN:
                restore.callback(signal.signal, number, signal.signal(number, record))
        yield request


class SharedStop:
    """Distribute a stop request to all processes, which read it after the same step.

    The requests of one step are read after the next step, so that no step waits for the communication.

    Args:
        request: of this process.
        device: for the tensors that are exchanged.
    """

    def __init__(self, request: StopRequest, device: torch.device) -> None:
        self._request, self._device = request, device
        self._pending: tuple[Any, torch.Tensor] | None = None

    def number(self) -> int:
        """Return the signal's number, or 0. Collective: call on every rank after every step."""
        if world_size() == 1:
            return self._request.number
        import torch
        from torch.distributed import ReduceOp, all_reduce

        known = self.finish()
        flag = torch.tensor(self._request.number, device=self._device)
        self._pending = (all_reduce(flag, ReduceOp.MAX, async_op=True), flag)
        return known

    def finish(self) -> int:
        """Wait for the pending request and return its number."""
        if self._pending is None:
            return 0
        work, flag = self._pending
        self._pending = None
        work.wait()
        return int(flag)
