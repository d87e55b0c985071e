"""The folder that an export writes: apart from its inputs, complete when it appears, absent when anything fails."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from braces_cli.core.utils.atomic_files import PARTIAL, check_output_folder, file_hint, umask
from braces_cli.core.utils.errors import BracesError, ConfigError
from braces_cli.core.utils.output_lock import output_lock

# What makes a folder a model or an adapter.
_LOADED_BY = ("config.json", "adapter_config.json")
# What transformers loads beside the weights, by its name: how the model generates, and its tokenizer.
FILES_WITH_WEIGHTS = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "chat_template.jinja",
    "chat_template.json", "additional_chat_templates",
)  # fmt: skip
# All that programs load from such a folder by its name, and the records beside it: what an earlier export has of these
# would be taken for a part of the new one.
_LOADED = (
    *_LOADED_BY, *FILES_WITH_WEIGHTS, "model.safetensors", "model-*.safetensors", "model.safetensors.index.json",
    "adapter_model.safetensors", "modeling_braces.py", "braces_*.json",
)  # fmt: skip


def check_output(output: Path, overwrite: bool, inputs: Sequence[Path]) -> None:
    """See that an export may be written to `output`, before minutes of loading.

    Args:
        inputs: folders that are read, and must be neither written into nor replaced.

    Raises:
        ConfigError: the folder is not empty, is or holds the working directory, or is, holds or lies in one of the
            inputs.
    """
    check_output_folder(output, overwrite)
    inside, here = output.resolve(), Path.cwd()
    if inside == here or inside in here.parents:
        hint = "Name a folder that is to be created."
        what = "the output folder cannot hold the working directory: a new folder may take its place"
        raise ConfigError(what, where=str(output), hint=hint)
    for source in inputs:
        outside = source.resolve()
        if inside == outside or outside in inside.parents or inside in outside.parents:
            hint = "Give an --output-dir that neither lies in an input nor holds one."
            raise ConfigError(f"the output folder overlaps the input {source}", where=str(output), hint=hint)


@contextmanager
def new_folder(output: Path, overwrite: bool) -> Iterator[Path]:
    """A new folder beside `output` that takes its place when all has gone well, and is gone otherwise.

    An `output` that holds something keeps what no export has written.

    Raises:
        ConfigError: another command is writing there.
        BracesError: the disk is full, or refuses.
    """
    path = Path(os.path.realpath(output))
    with output_lock(output):
        folder = None
        try:
            folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=PARTIAL, dir=path.parent))
            yield folder
            # mkdtemp makes folders for the owner alone; give what a plain mkdir() would have given.
            folder.chmod(0o777 & ~umask())
            _rename(folder, path, overwrite)
        except OSError as error:
            what = f"cannot write: {error.strerror or error}"
            raise BracesError(what, where=str(output), hint=file_hint(error)) from error
        finally:
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)


def _rename(folder: Path, path: Path, overwrite: bool) -> None:
    # Once more: the folder may have been filled since the work began.
    check_output_folder(path, overwrite)
    if not path.exists() or not any(path.iterdir()):
        folder.replace(path)
        return
    _move_into(folder, path)


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
