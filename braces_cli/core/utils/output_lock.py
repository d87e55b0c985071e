"""One command at a time writes to an output: a lock beside it, which names its holder.

The lock is the kernel's (flock), so it ends with its process, however that ends. Its file, `.NAME.lock` beside the
output, is removed by the process that holds it; one that a killed process left is taken over by the next command.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from braces_cli.core.utils.atomic_files import check_writable, file_hint, remove_partial_files
from braces_cli.core.utils.distributed import is_main
from braces_cli.core.utils.errors import ConfigError

# What flock says on a file system that has no locks; commands then run without.
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOLCK, errno.EBADF)


@contextmanager
def output_lock(*outputs: Path | None) -> Iterator[None]:
    """Hold the locks of files or folders that are going to be written; None is skipped.

    The lock of a folder is also that of outputs in it. Of several processes of one launch only the first locks. What a
    killed process left half written under a temporary name beside an output is removed, and so is an output folder
    that is new and in the end empty.

    Raises:
        ConfigError: another command is writing there, or nothing can be written there.
    """
    paths = {output: Path(os.path.realpath(output)) for output in outputs if output is not None}
    with ExitStack() as stack:
        for output, path in paths.items() if is_main() else ():
            if not any(other in path.parents for other in paths.values()):
                stack.enter_context(_locked(output, path))
        yield


@contextmanager
def _locked(output: Path, path: Path) -> Iterator[None]:
    # `os.path` and not `pathlib`, which raises where a part of a path cannot be looked into.
    if os.path.islink(path):
        hint = "Give another output, or remove the link."
        raise ConfigError("this link leads to itself", where=str(output), hint=hint)
    if os.path.exists(path) and not os.path.isdir(path) and not os.path.isfile(path):
        yield  # a device or a pipe
        return
    place = path.with_name(f".{path.name}.lock") if path.name else path
    new: list[Path] = []
    handle = None
    try:
        try:
            new = _make_parents(path)
            handle = _open_locked(place, output)
            remove_partial_files(path.parent, path.name)
        except OSError as error:
            # Not every folder that can be written to lies in one that can: the folder is locked itself.
            if not os.path.isdir(path) or not os.access(path, os.W_OK):
                check_writable(output)
                what = f"cannot write there: {error.strerror or error}"
                raise ConfigError(what, where=str(output), hint=file_hint(error)) from error
            place, handle = path, _open_locked(path, output)
        yield
    finally:
        if handle is not None:
            if place != path:
                with suppress(OSError):
                    place.unlink()
            os.close(handle)
        for folder in reversed(new):
            with suppress(OSError):  # it holds something
                folder.rmdir()


def _make_parents(path: Path) -> list[Path]:
    """Make the folders above `path`; returns those, and `path`, that were not there, from the top."""
    missing = []
    for folder in (path, *path.parents):
        if os.path.exists(folder):
            break
        missing.append(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    return missing[::-1]


def _open_locked(place: Path, output: Path) -> int:
    """Open `place`, lock it and note this process in it; returns the descriptor."""
    while True:
        is_folder = place.is_dir()
        flags = os.O_RDONLY if is_folder else os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
        handle = os.open(place, flags, 0o666)
        try:
            _lock(handle, output)
            # The holder before us may have removed the file after it was opened here.
            if not place.exists() or not os.path.samestat(os.fstat(handle), place.stat()):
                os.close(handle)
                continue
            if not is_folder:
                _write_owner(handle)
        except BaseException:
            os.close(handle)
            raise
        return handle


def _lock(handle: int, output: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        what = f"another braces command is writing there{_owner(handle)}"
        hint = "Wait until it has ended, or give another output."
        raise ConfigError(what, where=str(output), hint=hint) from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise


def _write_owner(handle: int) -> None:
    started = time.strftime("%Y-%m-%d %H:%M:%S")
    owner = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "started": started})
    with suppress(OSError):  # a full disk: the lock holds, nameless
        os.ftruncate(handle, 0)
        os.pwrite(handle, owner.encode(), 0)


def _owner(handle: int) -> str:
    """Who holds the lock, in parentheses; empty where that cannot be read."""
    try:
        owner = json.loads(os.pread(handle, 1000, 0))
        return f" (process {int(owner['pid'])} on {owner['host']}, since {owner['started']})"
    except (OSError, ValueError, KeyError, TypeError):
        return ""
