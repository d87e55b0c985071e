"""Folders for files that nobody keeps, in the system's temporary folder; those of killed processes are removed.

A folder is locked (flock) for as long as its process lives, so one that can be locked belongs to nobody.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PREFIX = "braces-scratch-"


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A new folder that is gone at the end; what killed processes left of theirs is removed first.

    Raises:
        OSError: the temporary folder cannot be written to.
    """
    _remove_abandoned(Path(tempfile.gettempdir()))
    folder, handle = _new_locked()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


def _new_locked() -> tuple[Path, int]:
    """A new folder, and the descriptor that holds its lock."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX))
        # Another process may have found and removed it before it was locked.
        with suppress(FileNotFoundError):
            handle = os.open(folder, os.O_RDONLY)
            if _locked(handle) is not False and folder.exists():
                return folder, handle
            os.close(handle)


def _remove_abandoned(parent: Path) -> None:
    for folder in parent.glob(f"{PREFIX}*"):
        with suppress(OSError):  # gone meanwhile, or somebody else's
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                if os.fstat(handle).st_uid == os.getuid() and _locked(handle):
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(handle)


def _locked(handle: int) -> bool | None:
    """Lock an open folder: False where another process holds the lock, None where the file system has no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True
