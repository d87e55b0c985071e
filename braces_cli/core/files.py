"""Path checks, atomic writes, hashes, locks and scratch folders.

A file is written under a temporary name `.NAME.xxxxxxxx.partial` next to its path and renamed. One command at a time
writes to an output: it holds the lock `.NAME.lock` next to the output, which names the process and ends with it.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import platform
import secrets
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from braces_cli import __version__
from braces_cli.core.distributed import is_main
from braces_cli.core.errors import BracesError, ConfigError

if TYPE_CHECKING:
    from torch import Tensor

PARTIAL = ".partial"
_HINTS = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "The disk is full: make room, or write to another disk."),
    **dict.fromkeys((errno.EACCES, errno.EPERM), "Check the permissions of the folder, or choose another folder."),
    **dict.fromkeys((errno.ENOENT, errno.ENOTDIR, errno.EISDIR), "Check the path."),
    errno.EFBIG: "The file exceeds the size limit: see `ulimit -f`, or write to another disk.",
    errno.EROFS: "The disk is mounted read-only: choose another folder.",
    errno.ENAMETOOLONG: "Choose a shorter name.",
}
_LIBRARIES = ("torch", "transformers", "accelerate", "datasets", "lm-eval", "safetensors")


def path_exists(path: Path) -> bool:
    """Return True for a file, a folder and a broken link. Reading the path then reports why it cannot be read."""
    return os.path.lexists(path)


def check_regular(path: Path, error: type[BracesError], hint: str, what: str = "file") -> None:
    """Raise `error` unless `path` is a regular file; opening a pipe or a device could block forever."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError as failure:
        raise error(f"no such {what}", where=str(path), hint=hint) from failure
    except (OSError, ValueError) as failure:  # ValueError: a null character in the name
        reason = getattr(failure, "strerror", None) or failure
        raise error(f"cannot read: {reason}", where=str(path), hint=hint) from failure
    if not stat.S_ISREG(mode):
        reason = "this is a folder, not a file" if stat.S_ISDIR(mode) else "this is a pipe or a device, not a file"
        raise error(reason, where=str(path), hint=hint)


def user_path(name: str | Path) -> Path:
    """Return the path of a command line or file with `~` expanded; a `~` of an unknown user stays.

    Raises:
        ConfigError: a null character.
    """
    if "\0" in str(name):
        raise ConfigError("a path cannot contain a null character", where=str(name), hint="Remove it.")
    return Path(os.path.expanduser(name))


def cache_folder() -> Path | None:
    """Return $BRACES_CACHE, else ~/.cache/braces; None if the variable is `off`."""
    named = os.environ.get("BRACES_CACHE")
    if named == "off":
        return None
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(named) if named else Path(root) / "braces"


def file_hint(error: OSError) -> str:
    """Return what the user can do about a failed file operation."""
    return _HINTS.get(error.errno or 0, "Check the path and the disk.")


def check_writable(path: Path) -> None:
    """Raise ConfigError if the file or folder `path` cannot be created."""
    place = path
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    try:
        with suppress(FileNotFoundError):
            os.lstat(path)  # a name that is too long
        if not place.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{place} is a file")
        # os.access is not enough: root has every permission for /proc, which refuses new files.
        tempfile.TemporaryFile(prefix=".braces-", dir=place).close()
    except OSError as error:
        what = f"cannot write there: {error.strerror or error}"
        raise ConfigError(what, where=str(path), hint=file_hint(error)) from error


def check_output_folder(path: Path, overwrite: bool, hint: str = "Give another one, or --overwrite.") -> None:
    """Check an output folder before any work.

    Args:
        hint: what to do about a folder that is not empty.

    Raises:
        ConfigError: `path` is a file, cannot be written to, or is not empty and `overwrite` is off.
    """
    if path_exists(path) and not path.is_dir():
        raise ConfigError("the output folder is a file", where=str(path), hint="Give another --output-dir.")
    check_writable(path)
    if not overwrite and path.is_dir() and any(path.iterdir()):
        raise ConfigError("the output folder is not empty", where=str(path), hint=hint)


def check_apart(path: Path, *inputs: str | Path | None) -> None:
    """Raise ConfigError if an output folder is, contains or lies inside an input folder.

    Args:
        inputs: names of models, adapters and folders; those that are not folders are skipped.
    """
    output = path.resolve()
    for source in inputs:
        read = None if source is None else user_path(source).resolve()
        if read is not None and (read == output or read in output.parents or output in read.parents) and read.is_dir():
            what = f"the output folder overlaps the input {source}"
            raise ConfigError(what, where=str(path), hint="Give an --output-dir outside all inputs.")


def check_output_file(path: Path, overwrite: bool, hint: str = "Give another name, or --overwrite.") -> None:
    """Check an output file before any work.

    Raises:
        ConfigError: `path` is a folder, cannot be written, or exists and `overwrite` is off.
    """
    if path.is_dir():
        raise ConfigError("the output file is a folder", where=str(path), hint="Name a file.")
    if path.is_file() or not path.exists():  # a device or a pipe is opened as it is
        check_writable(path.parent)
    if path_exists(path) and not overwrite:
        raise ConfigError("the output file exists already", where=str(path), hint=hint)


def partial_path(path: Path) -> Path:
    """Return a new temporary name next to `path`."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}{PARTIAL}")


def remove_partial_files(folder: Path, name: str | None = None) -> None:
    """Remove partial files and folders that killed processes left in `folder`. Call with the output's lock held.

    Args:
        name: remove only those of this output.
    """
    start = "*" if name is None else glob.escape(name)
    for path in folder.glob(f".{start}.????????{PARTIAL}"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` with a temporary name next to `path`, then rename the file to `path`."""
    temporary = partial_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        temporary.replace(path)
    except OSError as error:
        raise BracesError(f"cannot write: {error.strerror or error}", where=str(path), hint=file_hint(error)) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8", newline=""))


def write_json(path: Path, value: Any) -> None:
    """Write a JSON document atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def finite(value: Any) -> Any:
    """Return `value` with NaN and infinity, which JSON does not have, as None."""
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, (list, tuple)) else value


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file atomically; equal tensors and metadata give equal bytes."""
    from safetensors.torch import save

    # Cloned: safetensors refuses tensors that share memory. Not save_file: it does not raise OSError for a full disk.
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    content = save(plain, {"format": "pt", **(metadata or {})})
    # safetensors writes the metadata in random order.
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    ordered = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    size = -(-len(ordered) // 8) * 8  # tensors begin at a multiple of 8 bytes
    with_order = size.to_bytes(8, "little") + ordered.ljust(size) + content[end:]
    write_atomic(path, lambda temporary: temporary.write_bytes(with_order))


def file_hash(path: Path, error: type[BracesError]) -> str:
    """Return the SHA-256 of a file; raise `error` if the file cannot be read."""
    check_regular(path, error, "Give a file that can be read.")
    try:
        with path.open("rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError as failure:
        what = f"cannot read: {failure.strerror or failure}"
        raise error(what, where=str(path), hint=file_hint(failure)) from failure


def bytes_hash(parts: Iterable[bytes]) -> str:
    """Return the SHA-256 of the concatenated `parts`."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def value_hash(value: Any) -> str:
    """Return the SHA-256 of a value's JSON text."""
    return bytes_hash([json.dumps(value).encode()])


@cache
def versions(more: Sequence[str] = ()) -> dict[str, str]:
    """Return `{braces, python, torch, transformers, ...}` for the records that outputs contain.

    Args:
        more: other packages; a package that is not installed is left out.
    """
    from importlib import metadata  # slow to import

    found = {"braces": __version__, "python": platform.python_version()}
    for name in (*_LIBRARIES, *more):
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


@contextmanager
def output_lock(*outputs: Path | None) -> Iterator[None]:
    """Hold the locks of output files or folders; None is skipped.

    The lock of a folder includes outputs in the folder. Only the first process of a launch locks. Partial files from
    killed processes are removed, and so are new folders that are empty in the end.

    Raises:
        ConfigError: another command is writing there, or the output cannot be written.
    """
    paths = {output: Path(os.path.realpath(output)) for output in outputs if output is not None}
    with ExitStack() as stack:
        for output, path in paths.items() if is_main() else ():
            is_special = os.path.exists(path) and not path.is_dir() and not path.is_file()
            if not is_special and not any(other in path.parents for other in paths.values()):
                stack.enter_context(_locked(output, path))
        yield


@contextmanager
def _locked(output: Path, path: Path) -> Iterator[None]:
    from filelock import FileLock, Timeout

    new = [folder for folder in (path, *path.parents) if not os.path.lexists(folder)]
    place = path.parent / f".{path.name}.lock"
    lock = FileLock(place, timeout=0)
    try:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout:
            raise
        except OSError:
            # The parent of a mounted folder may be read-only, and some file systems have no locks.
            check_writable(output)
            # One for each user, who has no name in some containers.
            key = value_hash([os.path.expanduser("~"), str(path)])[:16]
            place = Path(tempfile.gettempdir()) / f"braces-{key}.lock"
            lock = FileLock(place, timeout=0)
            lock.acquire()
        with suppress(OSError):  # a full disk: the lock has no name
            started = time.strftime("%Y-%m-%d %H:%M:%S")
            place.write_text(f"process {os.getpid()} on {socket.gethostname()}, since {started}", encoding="utf-8")
        remove_partial_files(path.parent, path.name)
        yield
    except Timeout as error:
        owner = ""
        with suppress(OSError, UnicodeDecodeError):
            owner = place.read_text(encoding="utf-8")[:200]
        what = f"another braces command is writing there{f' ({owner})' if owner else ''}"
        raise ConfigError(what, where=str(output), hint="Wait until it has ended, or give another output.") from error
    finally:
        if lock.is_locked:
            with suppress(OSError):
                place.unlink()
            lock.release()
        for folder in new:
            with suppress(OSError):  # not empty
                folder.rmdir()


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Yield a new folder in the system's temporary folder; the folder is removed at the end."""
    with tempfile.TemporaryDirectory(prefix="braces-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)
