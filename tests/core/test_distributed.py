"""What launchers say of a process, and waiting for processes that do not come."""

from __future__ import annotations

import os
import signal
import socket
import threading
from typing import Any

import pytest

from braces_cli.core.distributed import JOIN_VARIABLE, check_variables, process_number, wait_for_all
from braces_cli.core.errors import BracesError, ConfigError

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", JOIN_VARIABLE)
TWO = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets variables in place of all that there are."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)

    def set_to(**values: str) -> None:
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return set_to


@pytest.mark.parametrize(
    ("values", "where"),
    [
        *(
            ({**TWO, "RANK": "0", name: value}, name)
            for name in VARIABLES[:3]
            for value in ("x", "1.5", "-1", "٣", "9" * 30, "0x1")
        ),
        ({**TWO, "RANK": "0", "MASTER_PORT": "http"}, "MASTER_PORT"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": "1"}, "MASTER_ADDR"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1"}, "MASTER_PORT"),
        (TWO, "RANK"),
        ({**TWO, "RANK": "", "LOCAL_RANK": "1"}, "RANK"),
        ({"RANK": "1"}, "RANK"),
        ({**TWO, "RANK": "2"}, "RANK"),
        ({"WORLD_SIZE": "0"}, "RANK"),
        ({"LOCAL_RANK": "1"}, "LOCAL_RANK"),
    ],
)
def test_what_cannot_be_true_is_refused(braces: Any, environment: Any, values: dict[str, str], where: str) -> None:
    """By every command, with the variable's name; a lone process that calls itself the second would write nothing."""
    environment(**values)
    with pytest.raises(ConfigError) as caught:
        check_variables()
    assert caught.value.where == where
    if where == "RANK":
        assert braces("recipe", "list").code == 2


@pytest.mark.parametrize(
    "values", [{}, {"RANK": "0"}, {"RANK": "", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, {**TWO, "RANK": "1"}]
)
def test_what_launchers_say_is_accepted(environment: Any, values: dict[str, str]) -> None:
    environment(**values)
    check_variables()
    assert process_number() == int(values.get("RANK") or 0)
    assert "" not in {os.environ.get(name) for name in VARIABLES}  # accelerate takes it for a number


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.mark.parametrize(("rank", "reason"), [("0", "1 of 2 have started"), ("1", "cannot be reached")])
def test_a_process_without_the_others_gives_up(environment: Any, rank: str, reason: str) -> None:
    """After the time that an environment variable sets; the message says who is missing."""
    environment(**{**TWO, "MASTER_PORT": free_port(), "RANK": rank, JOIN_VARIABLE: "1"})
    with pytest.raises(BracesError, match=reason) as caught:
        wait_for_all()
    assert JOIN_VARIABLE in str(caught.value.hint)


def test_a_limit_that_is_no_number_is_refused(environment: Any) -> None:
    environment(**{**TWO, "RANK": "0", JOIN_VARIABLE: "soon"})
    with pytest.raises(ConfigError, match=JOIN_VARIABLE):
        wait_for_all()


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_signal_ends_the_wait(environment: Any, rank: str) -> None:
    """torch itself would see it only when the last process has come."""

    class Stopped(Exception):
        pass

    def stop(number: int, frame: Any) -> None:
        raise Stopped

    environment(**{**TWO, "MASTER_PORT": free_port(), "RANK": rank, JOIN_VARIABLE: "60"})
    before = signal.signal(signal.SIGTERM, stop)
    timer = threading.Timer(1, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    try:
        with pytest.raises(Stopped):
            wait_for_all()
    finally:
        timer.join()
        signal.signal(signal.SIGTERM, before)
