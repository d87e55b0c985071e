"""The processes that `kill_and_resume.py` kills: `braces` in a process forked from one that has imported everything."""

from __future__ import annotations

import os
import resource
import runpy
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def body(place: str, words: list[str], writer: Any, limit: int | None) -> None:
    """Body of a process: `braces WORDS`, stdout thrown away, stderr into the pipe, a temporary folder of its own.

    Args:
        place: working folder.
        limit: bytes that a file may have; None is no limit.
    """
    from braces_cli.cli.main import main

    os.setsid()
    os.chdir(place)
    temporary_folder(Path(place)).mkdir(exist_ok=True)
    tempfile.tempdir = os.environ["TMPDIR"] = str(temporary_folder(Path(place)))
    os.dup2(writer.fileno(), 2)
    # For as long as the process lives. The old stream takes its descriptor for what that was before.
    sys.stdout, sys.stderr = open(os.devnull, "w"), open(2, "w", closefd=False)  # noqa: SIM115
    sys.argv = ["braces", *words]
    subprocess.run = _forked  # type: ignore[assignment]
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    main(words)


def temporary_folder(place: Path) -> Path:
    """What a process in the working folder `place` has for `/tmp`."""
    return place.with_name(f"{place.name}.tmp")


def _forked(call: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """What `subprocess.run` does for the process that proves an export (`python -I PROGRAM ...`), forked too.

    A fresh one needs ten times as long to import transformers as the rest of a merge takes.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(writer, 2)
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))  # the lock of the output, among others
        sys.argv = [str(word) for word in call[2:]]
        for name in [name for name in sys.modules if name.partition(".")[0] == "braces_cli"]:
            del sys.modules[name]  # the program sees to it that it cannot be imported
        code = 1
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader, encoding="utf-8", errors="replace") as stream:
        said = stream.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return subprocess.CompletedProcess(call, code, "", said)
