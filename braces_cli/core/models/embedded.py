"""The language model that comes with braces: what every command uses where no other is named.

It goes by `embedded`, and by `embedded@VERSION` in whatever is stored, because an adapter belongs to one version of it
and the folder it lies in differs from machine to machine.
"""

from __future__ import annotations

import logging
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from braces_cli.core.errors import ModelError
from braces_cli.core.schema import Kind, read

logger = logging.getLogger("braces")

NAME = "embedded"
ABOUT_FILE = "embedded.json"
_ABOUT = Kind(dict[str, Any], ModelError, "Install braces-cli again.")


def embedded_folder() -> Path:
    """Where it lies: a model folder like any other."""
    return Path(str(resources.files("braces_cli.assets") / NAME))


@cache
def embedded_name() -> str:
    """`embedded@VERSION` of the one installed."""
    about = read(_ABOUT, embedded_folder() / ABOUT_FILE)
    return f"{NAME}@{about['version']}"


def resolve(name: str) -> str:
    """The folder of the embedded model where `name` means that; any other name as it is.

    Raises:
        ModelError: another version than the one installed.
    """
    if name == NAME:
        return str(embedded_folder())
    if name.startswith(f"{NAME}@"):
        if name == embedded_name():
            return str(embedded_folder())
        raise ModelError(
            f"this braces brings {embedded_name()}",
            where=name,
            hint="Install the braces-cli that it was made with, or train again on this one.",
        )
    return name


def stored_name(where: str) -> str:
    """What a loaded base is called: `embedded@VERSION` for our own folder, else as it is."""
    return embedded_name() if Path(where) == embedded_folder().resolve() else where


@cache
def note_default() -> None:
    """Say that the embedded model is used because none was named; once a process, however many ask."""
    logger.info("using the model that comes with braces (%s); name another with --model FOLDER_OR_ID", embedded_name())
