"""What is at a path: looked at before it is opened. Light: the standard library only.

Writing that never leaves half a file: temporary name, read back, compare, rename.

Hashes that tell whether a file is still the one that something was made from.

One command at a time writes to an output: a lock beside it, which names its holder.

The lock is the kernel's (flock), so it ends with its process, however that ends. Its file, `.NAME.lock` beside the
output, is removed by the process that holds it; one that a killed process left is taken over by the next command.

Folders for files that nobody keeps, in the system's temporary folder; those of killed processes are removed.

A folder is locked (flock) for as long as its process lives, so one that can be locked belongs to nobody.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from braces_cli.core.distributed import is_main
from braces_cli.core.errors import BracesError, ConfigError

if TYPE_CHECKING:
    from torch import Tensor

# Nothing can have such a name.
_NOTHING = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)


def path_exists(path: Path) -> bool:
    """Whether something is at `path`: a file, a folder, a broken link, or what must not be looked at.

    Those who look in several places stop at the first one where something is: whatever cannot be read there is an error
    of the reader, where `Path.is_file` and `Path.exists` would send them on to the next place.
    """
    try:
        os.lstat(path)
    except OSError as error:
        return error.errno not in _NOTHING
    except ValueError:  # a null character
        return False
    return True


def check_regular(path: Path, error: type[BracesError], hint: str, what: str = "file") -> None:
    """Refuse what must not be opened: a folder, and a pipe or device, which could keep its reader waiting for ever.

    Args:
        error: class of the error.
        what: the file is called where there is none.

    Raises:
        BracesError: of the class `error`.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError as failure:
        raise error(f"no such {what}", where=str(path), hint=hint) from failure
    except (OSError, ValueError) as failure:  # a ValueError is a null character in the name
        reason = getattr(failure, "strerror", None) or failure
        raise error(f"cannot read: {reason}", where=str(path), hint=hint) from failure
    if not stat.S_ISREG(mode):
        reason = "this is a folder, not a file" if stat.S_ISDIR(mode) else "this is a pipe or a device, not a file"
        raise error(reason, where=str(path), hint=hint)


def user_path(name: str | Path) -> Path:
    """The path that a user wrote, `~` put into full; a `~` of no known user stays, where pathlib would raise.

    Raises:
        ConfigError: a null character, which no name can have.
    """
    if "\0" in str(name):
        raise ConfigError("no name has a null character in it", where=str(name), hint="Remove it.")
    return Path(os.path.expanduser(name))


def cache_folder() -> Path | None:
    """Where braces keeps what it can make again: $BRACES_CACHE, else ~/.cache/braces; None where that is `off`."""
    named = os.environ.get("BRACES_CACHE")
    if named == "off":
        return None
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(named) if named else Path(root) / "braces"


# The end of every temporary name, so that what a killed process left can be told from files of the user.
PARTIAL = ".partial"

# What to do about an operation on files that failed, by its error number.
_HINTS = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "The disk is full: make room, or write to another disk."),
    **dict.fromkeys(
        (errno.EACCES, errno.EPERM), "Permission is missing: check who owns the folder, or choose another."
    ),
    errno.EFBIG: "Files may not become that large here: see `ulimit -f`, or write to another disk.",
    errno.EBADF: "The stream is closed: do not close it, or send it to /dev/null.",
    errno.EROFS: "The disk is mounted read-only: choose another folder.",
    **dict.fromkeys((errno.ENOENT, errno.ENOTDIR, errno.EISDIR), "Check the path."),
    errno.ENAMETOOLONG: "Choose a shorter name.",
}


def file_hint(error: OSError) -> str:
    """What the user can do about a failed operation on a file."""
    return _HINTS.get(error.errno or 0, "Check the path and the disk.")


def disk_error(message: str, path: Path) -> OSError | None:
    """The full disk that a library reports in its own words (`... (os error 28)`); None where it speaks of none."""
    number = re.search(r"\(os error (\d+)\)", message)
    if number is None or int(number[1]) not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return None
    return OSError(int(number[1]), os.strerror(int(number[1])), str(path))


def check_writable(path: Path) -> None:
    """Try to write where the file or folder `path` is going to be, and leave nothing there.

    Raises:
        ConfigError: a part of the path is a file, or a folder there cannot be written to.
    """
    import tempfile

    # Permissions alone do not tell: they allow root to write to /proc, which refuses.
    place = path
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    try:
        if not place.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{place} is a file")
        # It has no name, where the file system has such files: a process that is killed here leaves nothing.
        tempfile.TemporaryFile(prefix=".braces-", dir=place).close()
    except OSError as error:
        what = f"cannot write there: {error.strerror or error}"
        raise ConfigError(what, where=str(path), hint=file_hint(error)) from error


def check_output_folder(path: Path, overwrite: bool, hint: str = "Give another one, or --overwrite.") -> None:
    """Refuse a folder that holds something, or a path that is no folder, before any work is done.

    Args:
        hint: what to do about a folder that holds something.

    Raises:
        ConfigError: `path` is a file, cannot be written to, or is a non-empty folder and `overwrite` is off.
    """
    if path_exists(path) and not path.is_dir():
        raise ConfigError("the output folder is a file", where=str(path), hint="Give another --output-dir.")
    check_writable(path)
    if not overwrite and path.is_dir() and any(path.iterdir()):
        raise ConfigError("the output folder is not empty", where=str(path), hint=hint)


def check_output_file(path: Path, overwrite: bool, hint: str = "Give another name, or --overwrite.") -> None:
    """The same for a single file."""
    if path.is_dir():
        raise ConfigError("the output file is a folder", where=str(path), hint="Name a file.")
    if path.is_file() or not path.exists():  # a device or a pipe is written to as it is
        check_writable(path.parent)
    if path_exists(path) and not overwrite:
        raise ConfigError("the output file exists already", where=str(path), hint=hint)


def umask() -> int:
    """The umask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def remove_partial_files(folder: Path, name: str | None = None) -> None:
    """Remove what killed processes left half written in `folder`. The caller holds the lock of what is written there.

    Args:
        name: file or folder that was written; None is all.
    """
    pattern = re.compile(rf"\.{'.+' if name is None else re.escape(name)}\.[a-z0-9_]{{8}}{re.escape(PARTIAL)}")
    for path in folder.glob(f".*{PARTIAL}"):
        if not pattern.fullmatch(path.name):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def write_atomic(path: Path, write: Callable[[Path], object], matches: Callable[[Path], bool]) -> None:
    """Call `write` on a temporary name beside `path`; rename it only when `matches` finds there what was meant."""
    import tempfile

    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=PARTIAL, dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        write(temporary)
        if not matches(temporary):
            raise BracesError("what was written differs from what was meant", where=str(path), hint="Check the disk.")
        # mkstemp makes files for the owner alone; give what a plain open() would have given.
        temporary.chmod(0o666 & ~umask())
        temporary.replace(path)
    except OSError as error:
        raise BracesError(f"cannot write: {error.strerror or error}", where=str(path), hint=file_hint(error)) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text, whole or not at all."""
    write_atomic(
        path,
        lambda temporary: temporary.write_text(text, encoding="utf-8", newline=""),
        lambda temporary: _holds(temporary, text.encode()),
    )


def write_json(path: Path, value: Any) -> None:
    """Write a JSON document, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def finite(value: Any) -> Any:
    """A value for JSON: numbers that JSON has not (infinite, NaN) become null."""
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, (list, tuple)) else value


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, whole or not at all; the same tensors and metadata give the same bytes."""
    from safetensors.torch import save

    # Cloned: safetensors refuses tensors that share memory, as the two ends of an axis share their middle.
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    # Not save_file: it reports a full disk as an error of its own rather than as OSError.
    content = _in_order(save(plain, {"format": "pt", **(metadata or {})}))
    # Bytes are compared, not numbers: NaN is never equal to NaN.
    write_atomic(path, lambda temporary: temporary.write_bytes(content), lambda temporary: _holds(temporary, content))


def _in_order(content: bytes) -> bytes:
    """A safetensors file with the keys of its metadata sorted; safetensors itself writes them in a random order."""
    start, end = 8, 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[start:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    ordered = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    size = -(-len(ordered) // 8) * 8  # tensors begin at a multiple of 8 bytes
    return size.to_bytes(8, "little") + ordered.ljust(size) + content[end:]


def _holds(path: Path, content: bytes) -> bool:
    """Whether the file is `content`, read in pieces."""
    if path.stat().st_size != len(content):
        return False
    place, piece = 0, 1 << 24
    with path.open("rb") as file:
        while part := file.read(piece):
            if part != content[place : place + len(part)]:
                return False
            place += len(part)
    return True


def file_hash(path: Path, error: type[BracesError]) -> str:
    """SHA-256 of a file.

    Raises:
        BracesError: of the class `error`: it cannot be read.
    """
    check_regular(path, error, "Give a file that can be read.")
    try:
        with path.open("rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError as failure:
        what = f"cannot read: {failure.strerror or failure}"
        raise error(what, where=str(path), hint=file_hint(failure)) from failure


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
            if _scratch_locked(handle) is not False and folder.exists():
                return folder, handle
            os.close(handle)


def _remove_abandoned(parent: Path) -> None:
    for folder in parent.glob(f"{PREFIX}*"):
        with suppress(OSError):  # gone meanwhile, or somebody else's
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                if os.fstat(handle).st_uid == os.getuid() and _scratch_locked(handle):
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(handle)


def _scratch_locked(handle: int) -> bool | None:
    """Lock an open folder: False where another process holds the lock, None where the file system has no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True
