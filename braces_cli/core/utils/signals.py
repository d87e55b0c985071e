"""SIGINT and SIGTERM at a moment that suits the work."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from braces_cli.core.utils.distributed import world_size

if TYPE_CHECKING:
    import torch

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
