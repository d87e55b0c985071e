"""The `braces` command: registers the subcommands and turns every failure into two lines and an exit code.

Importing the commands is cheap, because each of them imports what it needs (torch, transformers, ...) in its body.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from braces_cli import __version__
from braces_cli.cli import attr_build, evaluate, inspect_adapter, steer, train
from braces_cli.cli.render import print_json
from braces_cli.core.errors import BracesError

app = typer.Typer(
    name="braces",
    help="Fine-tune, evaluate, steer and inspect causal language models with LLMBraces adapters.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={
        "help_option_names": ["-h", "--help"],
        # Underscores are accepted wherever there are dashes: --max_steps, attr_build.
        "token_normalize_func": lambda token: token.replace("_", "-"),
    },
)
app.command("train")(train.train)
app.command("eval")(evaluate.evaluate)
app.command("attr-build")(attr_build.attr_build)
app.command("steer")(steer.steer)
app.add_typer(inspect_adapter.app, name="inspect")

# typer exports one exception of its option parser; the classes above it are what a wrong call raises.
_CallError: Any = typer.BadParameter.__mro__[2]


def _version(show: bool) -> None:
    if show:
        typer.echo(f"braces {__version__}")
        raise typer.Exit


@app.callback()
def braces(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Fine-tune, evaluate, steer and inspect causal language models with LLMBraces adapters."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line and exit with the code of DESIGN: 0, 1, 2, 3, 4, 130 or 143."""
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        code = app(args=args, standalone_mode=False)
    except BracesError as error:
        code = _fail(args, error.exit_code, error.message, error.where, error.hint)
    except _CallError as error:
        code = _call_error(args, error)
    except (KeyboardInterrupt, typer.Abort):
        code = _fail(args, 130, "interrupted", None, None)
    except BrokenPipeError:
        # The reader of our pipe has gone (`| head`): nothing to say, and nothing to say it to.
        sys.stdout = None
        code = 0
    except Exception as error:
        if "--debug" in args:
            raise
        what = f"{type(error).__name__}: {str(error).strip() or 'no message'}".splitlines()[0]
        code = _fail(args, 1, what, None, "This is a fault of braces; --debug shows where.")
    sys.exit(code if isinstance(code, int) else 0)


def _call_error(args: list[str], error: Any) -> int:
    message = error.format_message()
    if type(error).__name__ == "NoArgsIsHelpError":
        print(message)
        return 2
    # Its own hint names the command that was called (`Try 'braces train --help'`).
    path = getattr(getattr(error, "ctx", None), "command_path", "braces")
    return _fail(args, 2, message.rstrip("."), None, f"See `{path} --help`.")


def _fail(args: list[str], code: int, message: str, where: str | None, hint: str | None) -> int:
    if "--debug" in args:
        import traceback

        traceback.print_exc()
    if _wants_json(args):
        print_json({"error": {"code": code, "message": message, "where": where, "hint": hint}})
    head = f"{where}: {message}" if where else message
    print(f"Error: {head}" + (f"\n{hint}" if hint else ""), file=sys.stderr)
    return code


def _wants_json(args: list[str]) -> bool:
    return "--format=json" in args or ("--format", "json") in itertools.pairwise(args)
