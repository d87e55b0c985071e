"""A simulation of Windows for the modules of braces: BRACES_TEST_PLATFORM=windows python -m pytest.

On Linux the libraries need the modules and functions that Windows lacks, so only imports from modules of braces get
the modules below. The console has the encoding cp1252.
"""

import builtins
import errno
import fcntl
import os
import signal
import sys
from types import ModuleType
from typing import Any

MISSING_MODULES = ("fcntl", "grp", "pty", "pwd", "resource", "termios", "tty")
SIGNALS = ("SIGABRT", "SIGBREAK", "SIGFPE", "SIGILL", "SIGINT", "SIGSEGV", "SIGTERM", "SIG_DFL", "SIG_IGN")
MISSING_NAMES = (
    "O_CLOEXEC", "O_DIRECTORY", "O_NOFOLLOW", "O_NONBLOCK", "alarm", "chown", "fchmod", "fork", "geteuid", "getgid",
    "getpgid", "getuid", "killpg", "mkfifo", "pthread_sigmask", "sched_getaffinity", "setitimer", "setsid", "statvfs",
)  # fmt: skip


class _Module(ModuleType):
    """The module `real` as on Windows, with other `values`."""

    def __init__(self, real: ModuleType, **values: Any) -> None:
        super().__init__(real.__name__)
        self.__dict__.update(values, _real=real)

    def __getattr__(self, name: str) -> Any:
        if name in MISSING_NAMES or (name.startswith("SIG") and name not in SIGNALS):
            raise AttributeError(f"Windows has no {self._real.__name__}.{name}")
        return getattr(self._real, name)


def _open(path: Any, flags: int) -> int:
    if os.path.isdir(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))
    return os.open(path, flags)


def _fsync(handle: int) -> None:
    if fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        raise OSError(errno.EBADF, "Bad file descriptor")
    os.fsync(handle)


def install() -> None:
    """Simulate Windows in modules of braces that are imported from now on."""
    modules = {
        "os": _Module(os, name="nt", open=_open, fsync=_fsync),
        "sys": _Module(sys, platform="win32"),
        "signal": _Module(signal),
    }
    real = builtins.__import__

    def load(name: str, namespace: Any = None, *args: Any, **details: Any) -> Any:
        if not (namespace or {}).get("__name__", "").startswith("braces_cli"):
            return real(name, namespace, *args, **details)
        if name in MISSING_MODULES:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return modules.get(name) or real(name, namespace, *args, **details)

    builtins.__import__ = load
    os.environ["PYTHONIOENCODING"] = "cp1252"
