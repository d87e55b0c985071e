"""The folder that an export writes: apart from its inputs, complete when it appears, absent when anything fails."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from braces_cli.core.utils.atomic_files import check_output_folder, file_hint, umask
from braces_cli.core.utils.errors import BracesError, ConfigError

# What makes a folder a model or an adapter.
_LOADED_BY = ("config.json", "adapter_config.json")
# All that programs load from such a folder by its name, and the records beside it: what an earlier export has of these
# would be taken for a part of the new one.
_LOADED = (
    *_LOADED_BY, "generation_config.json", "model.safetensors", "model-*.safetensors", "model.safetensors.index.json",
    "adapter_model.safetensors", "modeling_braces.py", "braces_*.json", "tokenizer.json", "tokenizer_config.json",
    "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
    "spiece.model", "chat_template.jinja", "chat_template.json", "additional_chat_templates",
)  # fmt: skip


def check_output(output: Path, overwrite: bool, inputs: Sequence[Path]) -> None:
    """See that an export may be written to `output`, before minutes of loading.

    Args:
        inputs: folders that are read, and must be neither written into nor replaced.

    Raises:
        ConfigError: the folder is not empty, or is, holds or lies in one of the inputs.
    """
    check_output_folder(output, overwrite)
    inside = output.resolve()
    for source in inputs:
        outside = source.resolve()
        if inside == outside or outside in inside.parents or inside in outside.parents:
            hint = "Give an --output-dir that neither lies in an input nor holds one."
            raise ConfigError(f"the output folder overlaps the input {source}", where=str(output), hint=hint)


@contextmanager
def new_folder(output: Path, overwrite: bool) -> Iterator[Path]:
    """A new folder beside `output` that takes its place when all has gone well, and is gone otherwise.

    An `output` that holds something keeps what no export has written.
    """
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    except OSError as error:
        raise BracesError(f"cannot write: {error.strerror}", where=str(output), hint="Give another folder.") from error
    try:
        yield folder
        # mkdtemp makes folders for the owner alone; give what a plain mkdir() would have given.
        folder.chmod(0o777 & ~umask())
        _rename(folder, output, overwrite)
    except OSError as error:
        raise BracesError(
            f"cannot write: {error.strerror or error}", where=str(output), hint=file_hint(error)
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _rename(folder: Path, output: Path, overwrite: bool) -> None:
    if not output.exists() or not any(output.iterdir()):
        folder.replace(output)
        return
    assert overwrite
    _move_into(folder, output)


def _move_into(folder: Path, output: Path) -> None:
    """Move what is in `folder` into `output`, which holds an earlier export, files of others, or both; these stay.

    What an export is loaded by is removed first and moved last: interrupted, `output` is no checkpoint, rather than
    one of two halves.
    """
    new = {path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir()}
    for path in new:
        if (output / path).is_dir() and not (output / path).is_symlink():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(output / path))
    for path in sorted({path for pattern in _LOADED for path in output.glob(pattern)}):
        if path.is_symlink() or not path.is_dir():
            path.unlink()
        else:
            shutil.rmtree(path)
    for path in sorted(new, key=lambda path: (path.name in _LOADED_BY, path)):
        (output / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).replace(output / path)
