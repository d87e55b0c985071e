"""Processes that tests start: forked from one that has imported everything, so that a start costs nothing."""

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

_PRELOAD = [
    "tests.conftest", "braces_cli.cli.train", "braces_cli.training.loop", "braces_cli.training.run",
    "matplotlib.figure", "matplotlib.backends.backend_agg", "transformers.models.llama.modeling_llama",
    "torch.distributed.fsdp", "torch.distributed.tensor",
]  # fmt: skip


def start(target: Callable[..., Any], *args: Any) -> Any:
    """Start a process that runs `target(*args)`, a module-level function."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    process = context.Process(target=target, args=args)
    process.start()
    return process


def cli(argv: Sequence[str], log: Path, env: dict[str, str] | None = None) -> None:
    """Run `braces ARGV` with its output in `log`."""
    from braces_cli.cli.main import main

    os.environ.update(env or {})
    sys.stdout = sys.stderr = log.open("w")
    main(list(argv))


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return int(listener.getsockname()[1])


def launch(target: Callable[..., Any], count: int, *args: Any) -> list[int]:
    """Exit codes of `count` processes with the environment of torchrun, each running `target(env, *args)`."""
    port = str(free_port())
    processes = [
        start(
            target,
            {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count),
                "MASTER_ADDR": "localhost", "MASTER_PORT": port,
            },
            *args,
        )
        for rank in range(count)
    ]  # fmt: skip
    for process in processes:
        process.join(300)
        if process.exitcode is None:
            process.kill()
    return [process.exitcode for process in processes]
