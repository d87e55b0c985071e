"""Folders of checkpoints: whole or not there, the newest one, and no more than are wanted.

A checkpoint is written under a name that begins with a dot, flushed to the disk and renamed to `checkpoint-N`. It is
taken away in the opposite order. Whatever happens in between, a folder called `checkpoint-N` is complete.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from braces_cli.core.utils.errors import BracesError

_COMPLETE = re.compile(r"checkpoint-(\d+)")
_PARTIAL = ".checkpoint-"


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints in `folder`, oldest first; none where there is no folder."""
    if not folder.is_dir():
        return []
    found = ((_COMPLETE.fullmatch(path.name), path) for path in folder.iterdir() if path.is_dir())
    return [path for _, path in sorted((int(match[1]), path) for match, path in found if match)]


def newest(folder: Path) -> Path | None:
    """The checkpoint with the most steps."""
    return next(reversed(checkpoints(folder)), None)


def write_checkpoint(folder: Path, step: int, write: Callable[[Path], object]) -> Path:
    """Let `write` fill a folder, then make it `checkpoint-{step}`.

    Raises:
        BracesError: the disk is full or refuses; earlier checkpoints are as they were.
    """
    goal = folder / f"checkpoint-{step}"
    temporary = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f"{_PARTIAL}{step}.", dir=folder))
        write(temporary)
        for path in (*temporary.iterdir(), temporary):
            _flush(path)
        # mkdtemp makes folders for the owner alone; give what a plain mkdir would have given.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o777 & ~mask)
        remove(goal)
        temporary.rename(goal)
        _flush(folder)
    except (OSError, BracesError) as error:
        # `core.utils.atomic_files` turns an OSError into one of ours, which names a file that will be gone.
        reason = error if isinstance(error, OSError) else error.__cause__
        if not isinstance(reason, OSError):
            raise
        kept = newest(folder)
        raise BracesError(
            f"cannot write the checkpoint: {reason.strerror or reason}",
            where=str(goal),
            hint=f"Is the disk full? {f'{kept.name} is kept' if kept else 'There is no earlier one'}; "
            "make room and go on with --resume.",
        ) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    return goal


def rotate(folder: Path, limit: int) -> None:
    """Keep the newest `limit` checkpoints; 0 keeps all."""
    for path in checkpoints(folder)[:-limit] if limit else []:
        remove(path)


def remove(path: Path) -> None:
    """Take a checkpoint away if it is there, so that at no time half of one goes by its name."""
    if path.is_dir():
        doomed = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=path.parent))
        path.rename(doomed / path.name)
        shutil.rmtree(doomed, ignore_errors=True)


def remove_partial(folder: Path) -> None:
    """Take away what a killed process left half written."""
    for path in folder.glob(".*") if folder.is_dir() else ():
        if path.name.startswith(_PARTIAL):
            shutil.rmtree(path, ignore_errors=True)
        elif path.is_file() and any(path.name.startswith(f".{name}.") for name in _WRITTEN):
            path.unlink(missing_ok=True)


# What `core.utils.atomic_files` was writing under a temporary name when the process was killed.
_WRITTEN = (
    "adapter_config.json", "adapter_model.safetensors", "attributes.safetensors", "README.md", "loss.png",
    "metrics.jsonl", "run.json",
)  # fmt: skip


def _flush(path: Path) -> None:
    """Make sure that a file or the entries of a folder are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
