"""The `braces` command: registers the subcommands lazily and turns every failure into two lines and an exit code.

Each command imports what it needs (torch, transformers, ...) in its body, so that `--help` imports none of it.
"""

import errno
import importlib
import itertools
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Annotated, Any

import typer

from braces_cli import __version__
from braces_cli.cli import output
from braces_cli.cli.output import print_json, print_text
from braces_cli.core.config import matching_setting
from braces_cli.core.distributed import rank
from braces_cli.core.errors import BracesError, ConfigError, first_line
from braces_cli.core.files import file_hint
from braces_cli.core.text import error_text

# Name -> module and the function or typer app in it; imported and built when asked for.
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
# What `braces --help` says of each, in its order: that page imports none of them.
_SUMMARIES = {
    "train": "Fine-tune an adapter, or a baseline of peft, on texts, prompts and completions, instructions or chats.",
    "eval": "Score a base and its adapters (braces or peft), steered or not, on benchmarks, or on texts of your own.",
    "attr-build": (
        "Build an attribute from descriptions, pairs, words or texts, or from a built-in list (--list shows them)."
    ),
    "steer": "Generate text from prompts, steered along attributes by strength s (negative: away from them).",
    "merge": (
        "Write base and adapter into one plain checkpoint that transformers, vLLM or llama.cpp load without braces."
    ),
    "demo": (
        "Fine-tune, evaluate, steer, inspect and merge on the small model that braces brings: no hub, no GPU, no data."
    ),
    "env": "Versions, devices, threads and caches: what a bug report needs. Shows no token and no password.",
    "inspect": "Inspect a model and its adapter.",
    "export": "Export adapters and attributes for other programs to serve.",
    "recipe": "List and copy the training recipes that ship with braces.",
}
# How libraries say that there is no memory, where they do not raise MemoryError.
_NO_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "std::bad_alloc")


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


def _nothing() -> None: ...


def build_app(args: Sequence[str] = ()) -> typer.Typer:
    """The command-line app; where `args` begin with a command's name, with that command alone, and where they begin
    with `--help`, with summaries in place of the commands."""
    app = typer.Typer(
        name="braces",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={
            "help_option_names": ["-h", "--help"],
            # Underscores are accepted wherever there are dashes: --max_steps, attr_build.
            "token_normalize_func": lambda token: token.replace("_", "-"),
        },
    )
    app.callback()(braces)
    first = args[0].replace("_", "-") if args else ""
    if first in ("-h", "--help"):
        for name, summary in _SUMMARIES.items():
            app.command(name, help=summary)(_nothing)
        return app
    for name in [first] if first in _COMMANDS else _COMMANDS:
        module, attribute = _COMMANDS[name]
        command = getattr(importlib.import_module(f"braces_cli.cli.{module}"), attribute)
        if isinstance(command, typer.Typer):
            app.add_typer(command, name=name)
        else:
            app.command(name)(command)
    return app


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line and exit with 0, 1, 2, 3, 4 or 5 (see `core.errors`), 130 or 143."""
    output.open_streams()
    args = list(sys.argv[1:] if argv is None else argv)
    signal.signal(signal.SIGTERM, _terminate)
    try:
        app = build_app(args)
        code = 0 if _help(app, args) else app(args=args, standalone_mode=False)
        if code == 130:  # typer's word for Ctrl-C
            _fail(args, 130, "interrupted", None, None)
    except BracesError as error:
        code = _fail(args, error.exit_code, error.message, error.where, error.hint)
    except typer.TyperException as error:
        code = _call_error(args, error)
    except _Terminated:
        code = _fail(args, 143, "terminated", None, None)
    except BrokenPipeError:
        code = _reader_gone()
    except SystemExit as error:
        # typer ends the process itself, with 1, where it sees a broken pipe before we do.
        if not isinstance(error.__context__, BrokenPipeError):
            raise
        code = _reader_gone()
    except OSError as error:
        code = _system_error(args, error)
    except Exception as error:
        code = _surroundings(args, error)
    sys.exit(_end(args, code if isinstance(code, int) else 0))


def _end(args: list[str], code: int) -> int:
    """Write what stdout holds back; the exit code, which a full disk changes."""
    failure = output.stdout_failure()
    if failure is not None:
        if not isinstance(failure, BrokenPipeError) and code == 0:
            code = _system_error(args, failure)
        output.discard_stdout()
    return code


def _system_error(args: list[str], error: OSError) -> int:
    """Report what the system refused: a file that no room has checked, or a full disk behind stdout."""
    if error.filename is None and error.errno is None:
        return _fault(args, error)
    where = None if error.filename is None else str(error.filename)
    # No name of this length exists: the user named it.
    code = 2 if error.errno == errno.ENAMETOOLONG else 1
    return _fail(args, code, error.strerror or "failed", where, file_hint(error))


def _surroundings(args: list[str], error: Exception) -> int:
    """Report what the surroundings refuse: memory, a library, the locale; everything else is a fault of ours."""
    text = str(error)
    if isinstance(error, MemoryError) or any(words in text.lower() for words in _NO_MEMORY):
        # Libraries have work to do when the process ends, and would complain that there is no memory for that either.
        sys.unraisablehook = lambda unraisable: None
        hint = "Give it more memory, a smaller model, a smaller --batch-size or a shorter --max-length."
        return _fail(args, 1, "out of memory", None, hint)
    if isinstance(error, ImportError):
        hint = "Check the installation, and the memory that the process may use."
        return _fail(args, 1, f"a library cannot be loaded: {first_line(error)}", None, hint)
    return _fault(args, error)


def _fault(args: list[str], error: Exception) -> int:
    """Report a fault of ours."""
    what = f"{type(error).__name__}: {first_line(error) if str(error).strip() else 'no message'}"
    return _fail(args, 1, what, None, "This is a fault of braces; --debug shows where.")


def _reader_gone() -> int:
    """The reader of our pipe has gone (`| head`): nothing to say, and nothing to say it to."""
    output.discard_stdout()
    return 0


class _Terminated(BaseException):
    """SIGTERM: unwinds everything, is caught by nothing but `main`."""


def _terminate(number: int, frame: Any) -> None:
    raise _Terminated


def _help(app: typer.Typer, args: list[str]) -> bool:
    """Print the help that `COMMAND ... --help` asks for, if that is all of the call.

    Parsing even this one flag makes typer import pydantic, which takes as long as importing typer and rich.
    """
    if not args or args[-1] not in ("-h", "--help"):
        return False
    found = help_of(app, [name.replace("_", "-") for name in args[:-1]])
    if found is None:
        return False
    command, context = found
    # With Rich markup, get_help prints by itself and returns nothing.
    with output.to_stdout():
        print_text(command.get_help(context), end="")
    return True


def _call_error(args: list[str], error: typer.TyperException) -> int:
    message, context = error.format_message(), getattr(error, "ctx", None)
    if type(error).__name__ == "NoArgsIsHelpError":
        print_text(message)
        return 2
    name = getattr(error, "option_name", None) if type(error).__name__ == "NoSuchOption" else None
    # Of `-ngl` the parser names the `-n` alone.
    if name is not None and any(arg.replace("_", "-").partition("=")[0] == name for arg in args):
        flags = (flag for parameter in context.command.params for flag in parameter.opts) if context else ()
        ours = matching_setting(name, {flag.lstrip("-").replace("-", "_") for flag in flags})
        if ours is not None:
            message = f"No such option: {name} (here it is --{ours.replace('_', '-')})"
    # typer's own hint names the command that was called (`Try 'braces train --help'`).
    called = context.command_path if context else _named_command(args)
    return _fail(args, 2, message.rstrip("."), None, f"See `{called} --help`.")


def help_of(app: typer.Typer, names: Sequence[str]) -> tuple[Any, Any] | None:
    """The command that `names` lead to, and its context; None where there is no such command."""
    command: Any = typer.main.get_command(app)
    context = typer.Context(command, info_name="braces", **command.context_settings)
    for name in names:
        command = command.commands.get(name) if hasattr(command, "commands") else None
        if command is None:
            return None
        context = typer.Context(command, info_name=name, parent=context)
    return command, context


def _named_command(args: Sequence[str]) -> str:
    """The command that the first words of a call name, such as `braces inspect values`."""
    app = build_app(args)
    words: list[str] = []
    for word in args:
        if help_of(app, [*words, word.replace("_", "-")]) is None:
            break
        words.append(word.replace("_", "-"))
    return " ".join(["braces", *words])


def _fail(args: list[str], code: int, message: str, where: str | None, hint: str | None) -> int:
    if "--debug" in args:
        import traceback

        output.note(traceback.format_exc(), "\n\t")
    number = 0
    with suppress(ConfigError):  # RANK is not a number
        number = rank()
    if number > 0:
        # Most errors occur in every process of a launch, and the first process reports them; its end ends the others.
        # An error of this process alone is reported after a while.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(3)
        message = f"process {number}: {message}"
    elif _wants_json(args):
        with suppress(OSError):  # the error may be that of stdout
            print_json({"error": {"code": code, "message": message, "where": where, "hint": hint}})
    output.note(error_text(message, where, hint))
    return code


def _wants_json(args: list[str]) -> bool:
    return "--format=json" in args or ("--format", "json") in itertools.pairwise(args)
