"""The `braces` command: subcommands, and exceptions -> two lines and an exit code.

A command imports torch, transformers and the like in its body, so that `--help` imports none of them.
"""

import errno
import importlib
import io
import itertools
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from typing import Annotated, Any

import typer

from braces_cli import __version__
from braces_cli.cli import output
from braces_cli.core.config import matching_setting
from braces_cli.core.errors import BracesError, first_line
from braces_cli.core.files import file_hint
from braces_cli.core.text import error_text

# Name -> module and the function or Typer app in it.
_COMMANDS = {
    "train": ("train", "train"),
    "eval": ("evaluate", "evaluate"),
    "attr-build": ("attr_build", "attr_build"),
    "steer": ("steer", "steer"),
    "inspect": ("inspect", "app"),
    "merge": ("export", "merge"),
    "export": ("export", "app"),
    "demo": ("demo", "demo"),
    "env": ("env", "env"),
    "recipe": ("recipe", "app"),
}
# Messages of libraries without memory that do not raise MemoryError.
_NO_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "std::bad_alloc")


class _Terminated(BaseException):
    """SIGTERM, as an exception that only `main` catches."""


def _terminate(number: int, frame: Any) -> None:
    raise _Terminated


def _version(show: bool) -> None:
    if show:
        typer.echo(f"braces {__version__}")
        raise typer.Exit


def braces(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Fine-tune, evaluate, steer and inspect causal language models with LLMBraces adapters."""


def build_app(args: Sequence[str] = ()) -> typer.Typer:
    """Return the command-line app; if `args` begin with the name of a command, with this command only."""
    app = typer.Typer(
        name="braces",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={
            "help_option_names": ["-h", "--help"],
            # Underscores are accepted for dashes: --max_steps, attr_build.
            "token_normalize_func": lambda token: token.replace("_", "-"),
        },
    )
    app.callback()(braces)
    first = args[0].replace("_", "-") if args else ""
    for name in [first] if first in _COMMANDS else _COMMANDS:
        module, attribute = _COMMANDS[name]
        command = getattr(importlib.import_module(f"braces_cli.cli.{module}"), attribute)
        if isinstance(command, typer.Typer):
            app.add_typer(command, name=name)
        else:
            app.command(name)(command)
    return app


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command and exit: 0 to 5 (see `core.errors`), 130 if interrupted, 143 if terminated."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="strict" if stream is sys.stdin else "backslashreplace")
    args = list(sys.argv[1:] if argv is None else argv)
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        code = build_app(args)(args=args, standalone_mode=False)
        if code == 130:  # Typer's result for Ctrl-C
            raise KeyboardInterrupt
    except SystemExit as error:
        # Typer and Rich exit after a BrokenPipeError.
        if not isinstance(error.__context__, BrokenPipeError):
            raise
        code = 0
    except BrokenPipeError:  # the reader of stdout has ended, as in `| head`
        code = 0
    except (Exception, KeyboardInterrupt, _Terminated) as error:
        code = _failed(args, error)
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)  # None: not set from Python
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        if not isinstance(error, BrokenPipeError) and not code:
            code = _failed(args, error)
        # Python would write the buffer of stdout at exit, with an error message.
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code if isinstance(code, int) else 0)


def _failed(args: list[str], error: BaseException) -> int:
    """Report an exception and return the exit code."""
    if isinstance(error, BracesError):
        return _report(args, error.exit_code, error.message, error.where, error.hint)
    if isinstance(error, KeyboardInterrupt):
        return _report(args, 130, "interrupted")
    if isinstance(error, _Terminated):
        return _report(args, 143, "terminated")
    if isinstance(error, typer.TyperException):
        return _usage_error(args, error)
    if isinstance(error, OSError) and (error.filename is not None or error.errno is not None):
        where = None if error.filename is None else str(error.filename)
        code = 2 if error.errno == errno.ENAMETOOLONG else 1
        return _report(args, code, error.strerror or "failed", where, file_hint(error))
    if isinstance(error, MemoryError) or any(words in str(error).lower() for words in _NO_MEMORY):
        # At exit, libraries would report that they have no memory either.
        sys.unraisablehook = lambda unraisable: None
        hint = "Use more memory, a smaller model, a smaller --batch-size or a shorter --max-length."
        return _report(args, 1, "out of memory", None, hint)
    if isinstance(error, ImportError):
        hint = "Check the installation, and the memory that the process may use."
        return _report(args, 1, f"a library cannot be loaded: {first_line(error)}", None, hint)
    what = f"{type(error).__name__}: {first_line(error) if str(error).strip() else 'no message'}"
    return _report(args, 1, what, None, "This is a fault of braces; --debug shows where.")


def _usage_error(args: list[str], error: typer.TyperException) -> int:
    message, context = error.format_message(), getattr(error, "ctx", None)
    if type(error).__name__ == "NoArgsIsHelpError":
        output.print_text(message)
        return 2
    name = getattr(error, "option_name", None) if type(error).__name__ == "NoSuchOption" else None
    # For `-ngl` the parser names `-n` only.
    if name is not None and any(arg.replace("_", "-").partition("=")[0] == name for arg in args):
        flags = (flag for parameter in context.command.params for flag in parameter.opts) if context else ()
        ours = matching_setting(name, {flag.lstrip("-").replace("-", "_") for flag in flags})
        if ours is not None:
            message = f"No such option: {name} (here it is --{ours.replace('_', '-')})"
    words = list(itertools.takewhile(lambda word: not word.startswith("-"), args))
    called = context.command_path if context else " ".join(["braces", *words[:2]])
    return _report(args, 2, message.rstrip("."), None, f"See `{called} --help`.")


def _report(args: list[str], code: int, message: str, where: str | None = None, hint: str | None = None) -> int:
    """Print an error, as JSON on stdout too if requested, and return `code`."""
    if "--debug" in args:
        output.note(traceback.format_exc(), "\n\t")
    variable = os.environ.get("RANK") or "0"
    number = int(variable) if variable.isdecimal() else 0
    if number > 0:
        # Most errors occur in every process of a launch: the first process reports the error and ends the others.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(3)
        message = f"process {number}: {message}"
    elif "--format=json" in args or ("--format", "json") in itertools.pairwise(args):
        with suppress(OSError):  # stdout can be the cause
            output.print_json({"error": {"code": code, "message": message, "where": where, "hint": hint}})
    output.note(error_text(message, where, hint))
    return code
