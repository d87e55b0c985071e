"""Whether something has a name already. Light: the standard library only."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from braces_cli.core.utils.errors import ConfigError

# Nothing can have such a name.
_NOTHING = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)


def is_there(path: Path) -> bool:
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


def user_path(name: str | Path) -> Path:
    """The path that a user wrote, `~` put into full; a `~` of no known user stays, where pathlib would raise.

    Raises:
        ConfigError: a null character, which no name can have.
    """
    if "\0" in str(name):
        raise ConfigError("no name has a null character in it", where=str(name), hint="Remove it.")
    return Path(os.path.expanduser(name))
