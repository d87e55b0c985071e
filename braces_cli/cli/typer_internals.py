"""All that braces uses of typer beyond what typer documents; a test names each of them and fails when one disappears.

typer.main.get_command       the parser behind an app, with `commands`, `params` and `get_help`
NoArgsIsHelpError            the error of a call without arguments, whose message is the help; known by its class name
error.ctx.command_path       the command of a wrong call
context.get_parameter_source, .default_map, .command.params (each with `name`, `opts` and `type.name`)
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import typer

# Where a value came from, in the words of `Settings.given`.
_SOURCES = {"COMMANDLINE": "command line", "ENVIRONMENT": "command line", "DEFAULT_MAP": "file"}


def help_of(app: typer.Typer, names: Sequence[str]) -> tuple[Any, Any] | None:
    """The command that `names` lead to, and its context; None where there is no such command."""
    command: Any = typer.main.get_command(app)
    context = typer.Context(command, info_name="braces")
    for name in names:
        command = command.commands.get(name) if hasattr(command, "commands") else None
        if command is None:
            return None
        context = typer.Context(command, info_name=name, parent=context)
    return command, context


def is_call_without_arguments(error: typer.TyperException) -> bool:
    """Whether the error is that of a call without arguments, whose message is the help."""
    return type(error).__name__ == "NoArgsIsHelpError"


def called_command(error: typer.TyperException) -> str:
    """The command whose call was wrong, such as `braces inspect values`."""
    return str(getattr(getattr(error, "ctx", None), "command_path", "braces"))


def sources(context: typer.Context, names: Collection[str]) -> dict[str, str]:
    """Where the values of `names` were given, `command line` or `file`; those at their default are left out."""
    origin = {name: str(getattr(context.get_parameter_source(name), "name", "")) for name in names}
    return {name: _SOURCES[source] for name, source in origin.items() if source in _SOURCES}


def parameters(context: typer.Context) -> dict[str, Any]:
    """The parameters of the command of `context`, by name."""
    return {parameter.name: parameter for parameter in context.command.params if parameter.name is not None}


def set_defaults(context: typer.Context, values: dict[str, Any]) -> None:
    """Make `values`, by parameter name, the defaults of this call."""
    context.default_map = {**(context.default_map or {}), **values}
