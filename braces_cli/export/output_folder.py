"""The folder that an export writes: apart from its inputs, complete when it appears, absent when anything fails."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from braces_cli.core.utils.atomic_files import PARTIAL, check_output_folder, file_hint, umask
from braces_cli.core.utils.errors import BracesError, ConfigError
from braces_cli.core.utils.output_lock import output_lock


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
        raise ConfigError(
            "the output folder is replaced, so it cannot hold the working directory", where=str(output), hint=hint
        )
    for source in inputs:
        outside = source.resolve()
        if inside == outside or outside in inside.parents or inside in outside.parents:
            hint = "Give an --output-dir that neither lies in an input nor holds one."
            raise ConfigError(f"the output folder overlaps the input {source}", where=str(output), hint=hint)


@contextmanager
def new_folder(output: Path, overwrite: bool) -> Iterator[Path]:
    """A new folder beside `output` that takes its name when all has gone well, and is gone otherwise.

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
    old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
    path.replace(old)
    try:
        folder.replace(path)
    except OSError:
        old.replace(path)
        raise
    shutil.rmtree(old)
