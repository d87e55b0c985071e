"""Turn a function of one settings dataclass into a Typer command: its fields are the options.

    @command
    def merge(settings: MergeSettings) -> None: ...

Typer reads the options from a signature that is built here, so each option is declared once, as a field
(`core.utils.settings`), and a command inherits those that it shares with others. Light: typer and the standard library.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import typer

from braces_cli.cli.config_file import read_config_file
from braces_cli.cli.console import set_up
from braces_cli.cli.typer_internals import sources
from braces_cli.core.utils.settings import PANELS, Option, options_of

_CONFIG = "YAML file with options of this command; the command line wins."
# The command that runs, where it is not the one that this process was started with.
_words: ContextVar[tuple[str, ...] | None] = ContextVar("words", default=None)


def command_line() -> list[str]:
    """The words of the command that runs, such as `["braces", "train", "--data", "rows.jsonl"]`."""
    return list(_words.get() or ("braces", *sys.argv[1:]))


@contextmanager
def running(words: Sequence[str]) -> Iterator[None]:
    """Inside, `command_line` is `words`: for a command that runs others."""
    token = _words.set(tuple(words))
    try:
        yield
    finally:
        _words.reset(token)


def command(function: Callable[[Any], None]) -> Callable[..., None]:
    """The Typer command that builds the settings of `function` from its options and calls it with them."""
    kind = next(iter(_hints(function).values()))
    hints, described = get_type_hints(kind), options_of(kind)
    fields = {f.name: f for f in dataclasses.fields(kind) if f.name in described}

    def run(ctx: typer.Context, **values: Any) -> None:
        values.pop("config")
        set_up(values.get("quiet", False), values.get("debug", False))
        given = sources(ctx, values)
        function(kind(**{name: _stored(value, hints[name]) for name, value in values.items()}, given=given))

    parameters = [_parameter("ctx", typer.Context)]
    for name, about in sorted(described.items(), key=lambda item: (not item[1].argument, PANELS.index(item[1].panel))):
        kept = fields[name].default
        parameters.append(_parameter(name, _annotation(name, hints[name], about), _default(kept)))
    config = Annotated[
        Any,
        typer.Option("--config", help=_CONFIG, callback=read_config_file, is_eager=True, metavar="FILE", parser=Path),
    ]
    parameters.append(_parameter("config", config, None))
    run.__name__, run.__doc__, run.__module__ = function.__name__, function.__doc__, function.__module__
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    return {name: hint for name, hint in get_type_hints(function).items() if name != "return"}


def _parameter(name: str, annotation: Any, default: Any = inspect.Parameter.empty) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)


def _default(value: Any) -> Any:
    if value is dataclasses.MISSING:
        return inspect.Parameter.empty
    return list(value) or None if isinstance(value, tuple) else value


def _annotation(name: str, hint: Any, about: Option) -> Any:
    flags = (about.flag or "--" + name.replace("_", "-")).split(",")
    details: dict[str, Any] = {"help": about.help, "rich_help_panel": about.panel, "hidden": about.hidden}
    if about.min is not None:
        details["min"] = about.min
    if about.metavar is not None:
        details["metavar"] = about.metavar
    if about.choices:
        details.setdefault("metavar", "|".join(about.choices))
        details["autocompletion"] = lambda: list(about.choices)
    item = _item(hint)
    if item is not None:
        hint = list[item] | None  # type: ignore[valid-type]
    if about.argument:
        return Annotated[hint, typer.Argument(**details)]
    # One name, so that a flag of its own brings no `--no-...`.
    return Annotated[hint, typer.Option(*flags, **details)]


def _item(hint: Any) -> Any:
    """X of `tuple[X, ...]`, the type of a repeatable option; None for every other type."""
    return get_args(hint)[0] if get_origin(hint) is tuple else None


def _stored(value: Any, hint: Any) -> Any:
    if _item(hint) is not None:
        return tuple(value or ())
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    for kind in kinds:
        if isinstance(kind, type) and issubclass(kind, StrEnum) and isinstance(value, str):
            return kind(value)
    return value
