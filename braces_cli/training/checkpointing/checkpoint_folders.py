"""Folders of checkpoints: whole or not there, the newest one, and no more than are wanted.

A checkpoint is written under a name that begins with a dot, flushed to the disk and renamed to `checkpoint-N`. It is
taken away in the opposite order. Whatever happens in between, a folder called `checkpoint-N` is complete. Its manifest,
written last, holds the hash of each file: a file that was damaged, or belongs to another checkpoint, is not trained on.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypedDict

from braces_cli.core.schema import Count, Kind, Name, check_is_file, read
from braces_cli.core.utils.atomic_files import file_hint, remove_partial_files, write_json
from braces_cli.core.utils.errors import BracesError, ModelError
from braces_cli.core.utils.paths import path_exists

logger = logging.getLogger("braces")

# Written last, so that a checkpoint without one is not complete.
MANIFEST_FILE = "manifest.json"
_NAME = re.compile(r"checkpoint-(\d+)", re.ASCII)
# Cards may be edited; nothing reads them.
_NOT_HASHED = ("README.md",)
_PARTIAL = ".checkpoint-"
# What to do about a checkpoint with a damaged file.
DAMAGED_HINT = "Remove that checkpoint; --resume then goes on from the one before."


class Manifest(TypedDict):
    """`manifest.json`: the SHA-256 of each file of a checkpoint."""

    step: Count
    sha256: dict[Name, str]


_LISTED = Kind(object, ModelError, DAMAGED_HINT, "file of the checkpoint")
_MANIFEST = Kind(Manifest, ModelError, DAMAGED_HINT, "manifest")


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints in `folder`, oldest first; none where there is no folder."""
    return [path for path in _named(folder) if _is_complete(path)]


def incomplete_checkpoints(folder: Path) -> list[Path]:
    """Folders that are called like a checkpoint and are none, such as an empty one."""
    return [path for path in _named(folder) if not _is_complete(path)]


def _named(folder: Path) -> list[Path]:
    paths = [path for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    return sorted((path for path in paths if _NAME.fullmatch(path.name)), key=_step)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _is_complete(checkpoint: Path) -> bool:
    return path_exists(checkpoint / MANIFEST_FILE)


def newest(folder: Path) -> Path | None:
    """The checkpoint with the most steps."""
    return next(reversed(checkpoints(folder)), None)


def newest_intact(folder: Path) -> Path | None:
    """The newest checkpoint, each of its files held to the manifest.

    Raises:
        ModelError: a file differs from what was written, or is not there.
    """
    checkpoint = newest(folder)
    if checkpoint is not None:
        _check_manifest(checkpoint)
    return checkpoint


def warn_incomplete(folder: Path) -> None:
    """Name the checkpoints that `newest_intact` leaves out."""
    for path in incomplete_checkpoints(folder):
        logger.warning("%s is not a complete checkpoint; it is ignored", path)


def _check_manifest(checkpoint: Path) -> None:
    path = checkpoint / MANIFEST_FILE
    try:
        manifest = read(_MANIFEST, path)
    except ModelError as error:
        raise _damaged(path, f"the manifest is damaged: {error.message}") from error
    if manifest["step"] != _step(checkpoint):
        raise _damaged(path, f"the manifest is that of checkpoint-{manifest['step']}")
    for name, expected in manifest["sha256"].items():
        file = checkpoint / Path(name).name
        try:
            check_is_file(_LISTED, file)
            found = _hash(file)
        except ModelError as error:
            raise _damaged(file, error.message) from error
        except OSError as error:
            raise _damaged(file, f"a file of the checkpoint cannot be read: {error.strerror}") from error
        if found != expected:
            raise _damaged(file, "the file is not the one that was written with this checkpoint")


def _damaged(file: Path, what: str) -> ModelError:
    checkpoint = file.parent
    before = [path.name for path in checkpoints(checkpoint.parent) if _step(path) < _step(checkpoint)]
    then = f"continues from {before[-1]}" if before else "starts from the beginning"
    return ModelError(what, where=str(file), hint=f"Remove {checkpoint}; --resume then {then}.")


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_manifest(folder: Path, step: int) -> None:
    hashes = {path.name: _hash(path) for path in sorted(folder.iterdir()) if path.name not in _NOT_HASHED}
    write_json(folder / MANIFEST_FILE, {"format_version": 1, "step": step, "sha256": hashes})


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
        _write_manifest(temporary, step)
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
            hint=f"{file_hint(reason)} "
            + (f"{kept.name} is kept; continue from it with --resume." if kept else "There is no earlier checkpoint."),
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
        temporary = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=path.parent))
        path.rename(temporary / path.name)
        shutil.rmtree(temporary, ignore_errors=True)


def remove_partial(folder: Path) -> None:
    """Take away what a killed process left half written."""
    for path in folder.glob(f"{_PARTIAL}*") if folder.is_dir() else ():
        shutil.rmtree(path, ignore_errors=True)
    remove_partial_files(folder)


def _flush(path: Path) -> None:
    """Make sure that a file or the entries of a folder are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
