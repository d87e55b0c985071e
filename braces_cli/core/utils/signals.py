"""SIGINT and SIGTERM, acted on when the work can be interrupted."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Whether this process shall stop: `number` is that of the signal received, 0 as long as there was none."""

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
