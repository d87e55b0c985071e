"""Writing that never leaves half a file: temporary name, read back, compare, rename."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from braces_cli.core.utils.errors import BracesError, ConfigError

if TYPE_CHECKING:
    from torch import Tensor


def check_output_folder(path: Path, overwrite: bool) -> None:
    """Refuse a folder that holds something, or a path that is no folder, before any work is done.

    Raises:
        ConfigError: `path` is a file, or a non-empty folder and `overwrite` is off.
    """
    if path.exists() and not path.is_dir():
        raise ConfigError("the output folder is a file", where=str(path), hint="Give another --output-dir.")
    if not overwrite and path.is_dir() and any(path.iterdir()):
        raise ConfigError("the output folder is not empty", where=str(path), hint="Give another one, or --overwrite.")


def check_output_file(path: Path, overwrite: bool) -> None:
    """The same for a single file."""
    if path.is_dir():
        raise ConfigError("the output file is a folder", where=str(path), hint="Name a file.")
    if path.exists() and not overwrite:
        raise ConfigError("the output file exists already", where=str(path), hint="Give another name, or --overwrite.")


def umask() -> int:
    """The umask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_whole(path: Path, write: Callable[[Path], object], matches: Callable[[Path], bool]) -> None:
    """Call `write` on a temporary name beside `path`; rename it only when `matches` finds there what was meant."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        write(temporary)
        if not matches(temporary):
            raise BracesError("what was written differs from what was meant", where=str(path), hint="Check the disk.")
        # mkstemp makes files for the owner alone; give what a plain open() would have given.
        temporary.chmod(0o666 & ~umask())
        temporary.replace(path)
    except OSError as error:
        raise BracesError(
            f"cannot write: {error.strerror or error}", where=str(path), hint="Is the disk full?"
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text, whole or not at all."""
    write_whole(
        path,
        lambda temporary: temporary.write_text(text, encoding="utf-8", newline=""),
        lambda temporary: temporary.read_bytes() == text.encode(),
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
    """Write a safetensors file, whole or not at all."""
    import torch
    from safetensors.torch import load_file, save

    # Cloned: safetensors refuses tensors that share memory, as the two ends of an axis share their middle.
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}

    def matches(temporary: Path) -> bool:
        back = load_file(temporary)
        return back.keys() == plain.keys() and all(torch.equal(back[name], plain[name]) for name in plain)

    # Not save_file: it reports a full disk as an error of its own rather than as OSError.
    write_whole(
        path, lambda temporary: temporary.write_bytes(save(plain, {"format": "pt", **(metadata or {})})), matches
    )
