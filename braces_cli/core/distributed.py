"""Which of several processes this is, as torchrun and `accelerate launch` tell it, and how they agree.

Everything works in a lone process too, where each question has its trivial answer.

SIGINT and SIGTERM at a moment that suits the work.
"""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from braces_cli.core.errors import BracesError, ConfigError, first_line

if TYPE_CHECKING:
    import torch

_LAUNCH = "Launchers set it (torchrun, accelerate launch; recipes/launch). To run one process, unset it."
# Seconds that processes wait for each other to start; the environment variable sets another number.
JOIN_SECONDS = 1800
JOIN_VARIABLE = "BRACES_JOIN_SECONDS"
# Seconds of one attempt to reach the first process, after which signals are looked at; and between two questions.
_PATIENCE, _PAUSE = 2, 0.2
# Kept for as long as the process lives: with the first process's store, others would lose what they read from it.
_stores: list[Any] = []

T = TypeVar("T")
R = TypeVar("R")


def _variable(name: str, default: int) -> int:
    text = os.environ.get(name, "").strip()
    if text and not re.fullmatch(r"\d{1,9}", text, re.ASCII):
        raise ConfigError(f"`{text}` is no number", where=name, hint=_LAUNCH)
    return int(text) if text else default


def check_variables() -> None:
    """See that what the launcher says of this process can be true; a variable that is empty is removed.

    Raises:
        ConfigError: RANK, WORLD_SIZE or LOCAL_RANK is no number, or the first two do not fit each other; or, where
            there are several processes, RANK, MASTER_ADDR or MASTER_PORT is not set.
    """
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        if not os.environ.get(name, "?").strip():
            del os.environ[name]  # libraries would take it for a number
    number, size = rank(), world_size()
    if size < 1 or number >= size:
        what = f"there is no process {number} where WORLD_SIZE is {size} (they count from 0)"
        raise ConfigError(what, where="RANK", hint=_LAUNCH)
    if size > 1:
        # Without a number of its own each process would be the first, and wait for the others.
        for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
            if not os.environ.get(name, "").strip():
                raise ConfigError("is not set, and processes could not meet", where=name, hint=_LAUNCH)
        _variable("MASTER_PORT", 0)
    if _variable("LOCAL_RANK", 0) and size == 1:
        raise ConfigError("is set, and there is but one process", where="LOCAL_RANK", hint=_LAUNCH)


def rank() -> int:
    """Number of this process, from 0.

    Raises:
        ConfigError: RANK is no number.
    """
    return _variable("RANK", 0)


def process_number() -> int:
    """The same for whom an error would not help: 0 where RANK makes no sense."""
    try:
        return rank() if rank() < world_size() else 0
    except ConfigError:
        return 0


def world_size() -> int:
    """How many processes there are.

    Raises:
        ConfigError: WORLD_SIZE is no number.
    """
    return _variable("WORLD_SIZE", 1)


def is_main() -> bool:
    """Whether this process is the one that writes and prints."""
    return rank() == 0


def local_rank() -> int | None:
    """Number of this process on its machine, which is that of its accelerator; None in a lone process."""
    return _variable("LOCAL_RANK", 0) if world_size() > 1 else None


def join(device: torch.device) -> None:
    """Meet the other processes, over gloo on a CPU, over what the accelerator has otherwise.

    Raises:
        BracesError: see `wait_for_all`.
    """
    if world_size() > 1:
        from accelerate import PartialState

        wait_for_all()
        PartialState(cpu=device.type == "cpu")


def wait_for_all() -> None:
    """Wait until every process has started. Unlike torch, which waits in C++, this can be interrupted.

    Raises:
        BracesError: some have not come in time, or the first process cannot be reached.
        ConfigError: the limit is no number.
    """
    import socket

    from torch.distributed import DistError, TCPStore

    size, seconds = world_size(), _variable(JOIN_VARIABLE, JOIN_SECONDS)
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # torchrun has a store of its own; otherwise the first process has it, and torch will use the same one.
    hosts = is_main() and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    key = f"braces/started/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    deadline, reason = time.monotonic() + seconds, "the first process cannot be reached"
    patience = timedelta(seconds=_PATIENCE)
    store: Any = None
    while time.monotonic() < deadline:
        try:
            if store is None:
                if not hosts:  # torch would print pages about each attempt that fails
                    socket.create_connection((host, port), _PATIENCE).close()
                store = TCPStore(host, port, None, hosts, patience, wait_for_workers=False, multi_tenant=True)
                store.add(key, 1)
                _stores.append(store)
            count = store.add(key, 0)
        except OSError:
            pass
        except DistError as error:
            if hosts or store is not None:
                what = f"the processes cannot meet: {first_line(error)}"
                raise BracesError(what, where=f"{host}:{port}", hint="Look at the first process's error.") from error
        else:
            if count >= size:
                return
            reason = f"{count} of {size} have started"
        time.sleep(_PAUSE)
    hint = f"Start as many as WORLD_SIZE says, or wait longer: {JOIN_VARIABLE}=SECONDS."
    raise BracesError(f"waited {seconds} s for the other processes: {reason}", where="WORLD_SIZE", hint=hint)


def gathered(value: Any) -> list[Any]:
    """The values of all processes in the order of their rank; every process must ask."""
    if world_size() == 1:
        return [value]
    from torch.distributed import all_gather_object

    values: list[Any] = [None] * world_size()
    all_gather_object(values, value)
    return values


def full_tensor(tensor: Any) -> Any:
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
    wait_for_all()
    accelerator = Accelerator(cpu=cpu, kwargs_handlers=[timeout])
    return Processes(accelerator.process_index, accelerator.num_processes, accelerator)


_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Whether this process was asked to stop: `number` is the signal's, 0 as long as there was none."""

    number: int = 0


@contextmanager
def deferred() -> Iterator[StopRequest]:
    """Inside, the first SIGINT or SIGTERM is only noted; a second one acts at once, as it would outside."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request  # only the main thread can take signals, so nothing is lost
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    # A job that a shell starts in the background is meant to ignore SIGINT.
    before = {number: handler for number, handler in before.items() if handler != signal.SIG_IGN}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, frame: Any) -> None:
        request.number = number
        restore()

    for number in before:
        signal.signal(number, note)
    try:
        yield request
    finally:
        restore()


def act(number: int) -> None:
    """Do what the signal does outside of `deferred`: KeyboardInterrupt, or what the command line makes of SIGTERM."""
    signal.raise_signal(signal.Signals(number))


class SharedStop:
    """The request of any process to stop, known to all of them after the same step. No step waits for the answer: the
    requests of one step are read after the next one.

    Args:
        request: of this process.
        device: that processes exchange tensors on.
    """

    def __init__(self, request: StopRequest, device: torch.device) -> None:
        self._request, self._device = request, device
        self._pending: tuple[Any, torch.Tensor] | None = None

    def number(self) -> int:
        """The signal's number, 0 where there was none; every process must ask after every step."""
        if world_size() == 1:
            return self._request.number
        import torch
        from torch.distributed import ReduceOp, all_reduce

        known = self._wait()
        flag = torch.tensor(self._request.number, device=self._device)
        self._pending = (all_reduce(flag, ReduceOp.MAX, async_op=True), flag)
        return known

    def finish(self) -> None:
        """Wait for what is on its way."""
        self._wait()
        self._pending = None

    def _wait(self) -> int:
        if self._pending is None:
            return 0
        work, flag = self._pending
        work.wait()
        return int(flag)
