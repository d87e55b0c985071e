"""Variables of launchers, and processes that wait for each other."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from braces_cli.core.distributed import check_variables, deferred, rank
from braces_cli.core.errors import ConfigError

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
TWO = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Set variables instead of all existing ones."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)

    monkeypatch.setattr("time.sleep", lambda seconds: None)  # so that the first process prints first

    def set_to(**values: str) -> None:
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return set_to


@pytest.mark.parametrize(
    ("values", "where"),
    [
        *(({**TWO, "RANK": "0", name: value}, name) for name in VARIABLES[:3] for value in ("x", "-1", "٣", "9" * 30)),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": "1"}, "MASTER_ADDR"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1"}, "MASTER_PORT"),
        (TWO, "RANK"),
        ({**TWO, "RANK": "", "LOCAL_RANK": "1"}, "RANK"),
        ({"RANK": "1"}, "RANK"),
        ({**TWO, "RANK": "2"}, "RANK"),
        ({"WORLD_SIZE": "0"}, "RANK"),
    ],
)
def test_invalid_variables_are_refused(braces: Any, environment: Any, values: dict[str, str], where: str) -> None:
    environment(**values)
    with pytest.raises(ConfigError) as caught:
        check_variables()
    assert caught.value.where == where
    assert braces("recipe", "list").code == 2


@pytest.mark.parametrize(
    "values", [{}, {"RANK": "0"}, {"RANK": "", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, {**TWO, "RANK": "1"}]
)
def test_valid_variables_are_accepted(environment: Any, values: dict[str, str]) -> None:
    environment(**values)
    check_variables()
    assert rank() == int(values.get("RANK") or 0)
    assert "" not in {os.environ.get(name) for name in VARIABLES}  # accelerate would parse it as a number


def test_a_signal_ends_the_wait_for_other_processes() -> None:
    """torch waits in C++, where Python's signal handlers do not run."""
    code = "\n".join([
        "import signal, torch, threading, os",
        "from braces_cli.core.distributed import join",
        "signal.signal(signal.SIGTERM, lambda number, frame: None)",
        "threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()",
        "join(torch.device('cpu'))",
    ])  # fmt: skip
    variables = {**TWO, "MASTER_PORT": "29561", "RANK": "0", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | variables, timeout=120, check=False)
    assert done.returncode == -signal.SIGTERM


def test_the_first_signal_is_deferred_and_the_second_is_not() -> None:
    with deferred() as request:
        signal.raise_signal(signal.SIGINT)
        assert request.number == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
