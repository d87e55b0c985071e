"""What is at a path: looked at before it is opened. Light: the standard library only."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from braces_cli.core.utils.errors import BracesError, ConfigError

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
