"""Writing that never leaves half a file: temporary name, read back, compare, rename."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from braces_cli.core.utils.errors import BracesError, ConfigError
from braces_cli.core.utils.paths import path_exists

if TYPE_CHECKING:
    from torch import Tensor


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
