"""The folder that an export writes: apart from its inputs, complete when it appears, absent when anything fails."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from braces_cli.core.utils.atomic_files import check_output_folder, umask
from braces_cli.core.utils.errors import BracesError, ConfigError


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
    """A new folder beside `output` that takes its name when all has gone well, and is gone otherwise."""
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
            f"cannot write: {error.strerror or error}", where=str(output), hint="Is the disk full?"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _rename(folder: Path, output: Path, overwrite: bool) -> None:
    if not output.exists() or not any(output.iterdir()):
        folder.replace(output)
        return
    assert overwrite
    old = Path(tempfile.mkdtemp(prefix=f".{output.name}.old.", dir=output.parent))
    output.replace(old)
    try:
        folder.replace(output)
    except OSError:
        old.replace(output)
        raise
    shutil.rmtree(old)
