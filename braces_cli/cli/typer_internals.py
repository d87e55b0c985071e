"""All that braces uses of typer beyond what typer documents; a test names each of them and fails when one disappears.

typer.main.get_command       the parser behind an app, with `commands`, `params`, `context_settings` and `get_help`
NoArgsIsHelpError            the error of a call without arguments, whose message is the help; known by its class name
error.ctx.command_path       the command of a wrong call
error.option_name, .message  of an option that the command does not have
context.get_parameter_source, .default_map, .command.params (each with `name`, `opts`, `nargs` and `type.name`;
    options with `multiple`)
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
    context = typer.Context(command, info_name="braces", **command.context_settings)
    for name in names:
        command = command.commands.get(name) if hasattr(command, "commands") else None
        if command is None:
            return None
        context = typer.Context(command, info_name=name, parent=context)
    return command, context


def is_call_without_arguments(error: typer.TyperException) -> bool:
    """Whether the error is that of a call without arguments, whose message is the help."""
    return type(error).__name__ == "NoArgsIsHelpError"


def called_command(error: typer.TyperException) -> str | None:
    """The command whose call was wrong, such as `braces inspect values`; None where the error does not say."""
    return getattr(getattr(error, "ctx", None), "command_path", None)


def unknown_option(error: typer.TyperException) -> tuple[str, str, set[str]] | None:
    """An option that the command does not have: what it was called, the error without suggestions, and the settings
    that the command has, named with underscores; None of another error."""
    name, context = getattr(error, "option_name", None), getattr(error, "ctx", None)
    if name is None or context is None or type(error).__name__ != "NoSuchOption":
        return None
    return name, str(error.message), setting_names(context)


def setting_names(context: typer.Context) -> set[str]:
    """Settings of the command of `context` as users name them, with underscores."""
    flags = (flag for parameter in parameters(context).values() for flag in parameter.opts)
    return {flag.lstrip("-").replace("-", "_") for flag in flags}


def sources(context: typer.Context, names: Collection[str]) -> dict[str, str]:
    """Where the values of `names` were given, `command line` or `file`; those at their default are left out."""
    origin = {name: str(getattr(context.get_parameter_source(name), "name", "")) for name in names}
    return {name: _SOURCES[source] for name, source in origin.items() if source in _SOURCES}


def parameters(context: typer.Context) -> dict[str, Any]:
    """The parameters of the command of `context`, by name."""
    return {parameter.name: parameter for parameter in context.command.params if parameter.name is not None}


def is_repeatable(parameter: Any) -> bool:
    """Whether a parameter takes a list of values."""
    return bool(getattr(parameter, "multiple", False)) or parameter.nargs == -1


def set_defaults(context: typer.Context, values: dict[str, Any]) -> None:
    """Make `values`, by parameter name, the defaults of this call."""
    context.default_map = {**(context.default_map or {}), **values}
