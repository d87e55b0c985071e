"""Hashes that tell whether a file is still the one that something was made from."""

from __future__ import annotations

import hashlib
from pathlib import Path

from braces_cli.core.utils.atomic_files import file_hint
from braces_cli.core.utils.errors import BracesError
from braces_cli.core.utils.paths import check_regular


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
