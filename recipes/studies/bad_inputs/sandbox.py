"""Run one call of `braces` in a forked process and say what was wrong with the way it ended.

The parent has imported everything, so a fork pays for no import, a crash ends the child alone, and a limit of CPU time
stops what never ends. The child sees a terminal-less process of its own: its working folder, standard streams, HOME,
temporary folder and environment are those of the case.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import hashlib
import importlib
import io
import json
import os
import pkgutil
import re
import resource
import select
import signal
import stat
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CPU_SECONDS = 20
WALL_SECONDS = 300
MEMORY = 24 << 30
# A file of this name, written by code that must never run.
CANARY = "EXECUTED"
_LONGEST_LINE = 1000
# All of C0 but tab and new line, DEL, C1, and the characters that turn or break a line of text.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
_FAULT = "This is a fault of braces"
# Libraries that a command imports in its body.
_WARM = (
    "transformers.models.llama.modeling_llama", "transformers.models.auto.modeling_auto", "accelerate", "datasets",
    "lm_eval.tasks", "lm_eval.models.huggingface", "sklearn.linear_model", "sklearn.feature_extraction.text",
    "pyarrow.parquet", "matplotlib.figure", "matplotlib.backends.backend_agg", "safetensors.torch", "rich.progress",
    "rich.table", "yaml", "pydantic.main", "pydantic.fields", "pydantic.type_adapter", "pydantic.functional_validators",
    "PIL.BmpImagePlugin", "PIL.GifImagePlugin", "PIL.JpegImagePlugin", "PIL.PpmImagePlugin", "encodings.utf_8_sig",
    "peft", "vaderSentiment.vaderSentiment", "jinja2", "torch.optim", "torch._dynamo",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One call and what is right for it.

    Attributes:
        args: words after `braces`.
        codes: exit codes that are right.
        what: was done to the input; cases with the same words are of the same kind.
        stdin: bytes on standard input; None: nothing there (/dev/null).
        env: variables set for this call.
        outputs: paths that the call may write when it ends with 0 or 5, relative to the case's folder.
        unprivileged: run without the capabilities of root, whom no permission stops.
        file_limit: no file may grow beyond so many bytes, as on a full disk.
        closed: standard streams that are closed at the start, of 0, 1 and 2.
        encoding: of the standard streams.
        raw_text: stdout carries the texts of a prompt as they are.
        keeps: what was written before the failure may stay, as after a full disk.
    """

    args: tuple[str, ...]
    codes: frozenset[int]
    what: str
    stdin: bytes | None = None
    env: dict[str, str] = field(default_factory=dict)
    outputs: tuple[str, ...] = ()
    unprivileged: bool = False
    file_limit: int | None = None
    closed: tuple[int, ...] = ()
    encoding: str = "utf-8"
    raw_text: bool = False
    keeps: bool = False


@dataclass(frozen=True)
class Outcome:
    """How a call ended: its exit code (None where it was stopped), streams, seconds, and what is wrong with it."""

    code: int | None
    out: str
    err: str
    seconds: float
    wrong: list[str]


def warm() -> None:
    """Import whatever any command imports, so that no child has to."""
    # As the command line does before it imports them, where stderr is no terminal.
    os.environ.update(
        {
            "TQDM_DISABLE": "1",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "TRANSFORMERS_VERBOSITY": "error",
        }
        | {"TRANSFORMERS_NO_ADVISORY_WARNINGS": "1", "HF_HUB_VERBOSITY": "error", "CUDA_VISIBLE_DEVICES": ""}
    )
    import braces_cli

    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        ours = (module.name for module in pkgutil.walk_packages(braces_cli.__path__, "braces_cli."))
        for name in (*_WARM, *(name for name in ours if not name.endswith("__main__"))):
            # What is not installed is not imported by the command, either.
            with contextlib.suppress(Exception):
                importlib.import_module(name)
    import torch

    torch.set_num_threads(1)
    # The children share these objects; a collection would copy every page of them.
    gc.collect()
    gc.freeze()


def run(case: Case, folder: Path, patience: float = WALL_SECONDS) -> Outcome:
    """Run the case in `folder`, which holds what was made for it, and judge how it ended.

    Args:
        patience: seconds after which a call that waits for ever is stopped.
    """
    given = folder.with_name(f"{folder.name}.stdin")
    given.write_bytes(case.stdin or b"")
    before = _snapshot(folder)
    began = time.monotonic()
    # Pipes: a limit on the size of files must not cut the streams.
    pipes = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        _child(case, folder, given, [write for _, write in pipes])
    for _, write in pipes:
        os.close(write)
    code, content = _wait(child, [read for read, _ in pipes], patience)
    seconds = time.monotonic() - began
    given.unlink()
    out, err = (stream.decode(case.encoding, "replace") for stream in content)
    wrong = list(_ending(case, code, err))
    wrong += _streams(case, code, out, err)
    wrong += _files(case, code, before, _snapshot(folder))
    return Outcome(code, out, err, seconds, wrong)


def _wait(child: int, streams: Sequence[int], patience: float) -> tuple[int | None, list[bytes]]:
    """The exit code of the child, None where it had to be stopped, and what came from its streams.

    Ends what the child may have started, too.
    """
    handle = os.pidfd_open(child)
    content = {stream: bytearray() for stream in streams}
    open_streams, ended = list(streams), False
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline and not (ended and not open_streams):
        # Where the child has ended, what is in the pipes is read without waiting for others that hold them.
        ready = select.select([*open_streams, *([] if ended else [handle])], [], [], 0.0 if ended else 1.0)[0]
        if ended and not ready:
            break
        ended = ended or handle in ready
        for stream in (each for each in ready if each != handle):
            part = os.read(stream, 1 << 16)
            content[stream] += part
            if not part:
                open_streams.remove(stream)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)
    if not ended:
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    for number in (handle, *streams):
        os.close(number)
    return os.WEXITSTATUS(status) if ended and os.WIFEXITED(status) else None, [bytes(content[s]) for s in streams]


def _child(case: Case, folder: Path, given: Path, streams: Sequence[int]) -> None:
    """Body of the child; never returns."""
    code = 70
    try:
        os.setsid()
        _surroundings(case, folder, given, streams)
        code = _call(case.args)
    except BaseException:  # nothing may go back into the parent's loop
        with contextlib.suppress(Exception):
            os.write(2, traceback.format_exc().encode("utf-8", "replace"))
    finally:
        os._exit(code)


def _surroundings(case: Case, folder: Path, given: Path, streams: Sequence[int]) -> None:
    os.chdir(folder)
    handle = os.open(os.devnull if case.stdin is None else given, os.O_RDONLY)
    for number, place in enumerate((handle, *streams)):
        os.dup2(place, number)
    os.closerange(3, 4096)
    for number in case.closed:
        os.close(number)
    sys.stdin = None if 0 in case.closed else _opened(0, case.encoding)
    sys.stdout = None if 1 in case.closed else _opened(1, case.encoding)
    sys.stderr = None if 2 in case.closed else _opened(2, case.encoding)
    (folder / "home").mkdir(exist_ok=True)
    (folder / "tmp").mkdir(exist_ok=True)
    os.environ.update({"HOME": str(folder / "home"), "TMPDIR": str(folder / "tmp"), **case.env})
    tempfile.tempdir = None
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 1))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if case.file_limit is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (case.file_limit, case.file_limit))
    if case.unprivileged and os.getuid() == 0:
        _drop_capabilities()


def _opened(number: int, encoding: str) -> Any:
    """A standard stream as Python opens it."""
    errors = "backslashreplace" if number == 2 else "strict"
    return os.fdopen(number, "w" if number else "r", 1 if number == 2 else -1, encoding, errors, closefd=False)


def _drop_capabilities() -> None:
    """Leave root with the permissions that the modes of its own files give."""
    version, set_securebits, no_root = 0x20080522, 28, 3
    header, nothing = (ctypes.c_uint32 * 2)(version, 0), (ctypes.c_uint32 * 6)()
    system = ctypes.CDLL(None, use_errno=True)
    # Without the bits, a program that the call starts would have them all again.
    if system.prctl(set_securebits, no_root, 0, 0, 0) != 0 or system.capset(header, nothing) != 0:
        raise OSError(ctypes.get_errno(), "cannot drop capabilities")


def _call(args: Iterable[str]) -> int:
    """What the console script does with these words; returns the exit code of its process."""
    from braces_cli.cli.app import main

    sys.argv = ["braces", *args]
    code: Any = 0
    try:
        main()
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    try:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None and not stream.closed:
                stream.flush()
    except OSError:
        code = 120  # as the interpreter ends
    if isinstance(code, str):
        os.write(2, code.encode())
    return code if isinstance(code, int) else int(code is not None)


def _ending(case: Case, code: int | None, err: str) -> Iterable[str]:
    """What is wrong with the exit code and the way of the error."""
    if code is None:
        yield "stopped: out of time or killed"
    elif code not in case.codes:
        yield f"exit code {code}, right: {', '.join(map(str, sorted(case.codes)))}"
    if "Traceback (most recent call last)" in err:
        yield "traceback"
    if _FAULT in err:
        yield "fault of braces"
    errors = sum(line.startswith("Error:") for line in err.splitlines())
    if code in (1, 2, 3, 4) and errors != 1 and 2 not in case.closed:
        yield f"{errors} lines of Error:"
    if code == 0 and errors:
        yield "an Error: line and exit code 0"


def _streams(case: Case, code: int | None, out: str, err: str) -> Iterable[str]:
    """What is wrong with the two streams."""
    streams = {"stderr": err} if case.raw_text else {"stdout": out, "stderr": err}
    for name, text in streams.items():
        found = sorted({f"U+{ord(c):04X}" for c in _CONTROL.findall(text)})
        if found:
            yield f"control character in {name}: {' '.join(found)}"
    if any(len(line) > _LONGEST_LINE for line in err.splitlines()):
        yield "a line of more than 1,000 characters in stderr"
    if "json" in case.args and out and code in (0, 5) and not _is_json(out):
        yield "stdout is not JSON"


def _is_json(text: str) -> bool:
    """Whether this is one JSON document, or one a line."""
    try:
        json.loads(text)
    except ValueError:
        try:
            [json.loads(line) for line in text.split("\n") if line]
        except ValueError:
            return False
    return True


def _files(case: Case, code: int | None, before: dict[str, str], after: dict[str, str]) -> Iterable[str]:
    """What is wrong with the files that are there now."""
    if any(name.rpartition("/")[2] == CANARY for name in after):
        yield "code of an input was executed"
    allowed = case.outputs if case.keeps or code in (0, 5) else ()
    for name in sorted(set(before) | set(after)):
        if before.get(name) == after.get(name) or name in ("home", "tmp"):
            continue
        inside = any(place in (name, ".") or name.startswith(f"{place}/") for place in allowed)
        hidden = name.rpartition("/")[2].startswith(".")
        if name not in before and (not inside or hidden):
            yield f"left behind: {name}"
            return
        if name in before and not inside:
            yield f"{'removed' if name not in after else 'changed'}: {name}"
            return


def _snapshot(folder: Path) -> dict[str, str]:
    """Every path below `folder` with what tells that it has changed."""
    found: dict[str, str] = {}
    for place, folders, files in os.walk(os.fsencode(folder)):
        for entry in (*folders, *files):
            path = os.path.join(place, entry)
            about = os.lstat(path)
            name = os.fsdecode(os.path.relpath(path, os.fsencode(folder)))
            kind = stat.S_IFMT(about.st_mode)
            text = str(kind)
            if stat.S_ISREG(kind):
                with contextlib.suppress(OSError), open(path, "rb") as handle:
                    text += hashlib.file_digest(handle, "sha1").hexdigest()
            elif stat.S_ISLNK(kind):
                text += os.fsdecode(os.readlink(path))
            found[name] = text
    return found
