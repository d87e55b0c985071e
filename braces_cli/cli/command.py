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
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

from braces_cli.cli.config_file import read_config_file
from braces_cli.cli.console import set_up
from braces_cli.cli.typer_internals import sources
from braces_cli.core.utils.distributed import check_variables
from braces_cli.core.utils.errors import ConfigError
from braces_cli.core.utils.settings import PANELS, Option, flag_of, options_of

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
        check_variables()
        set_up(values.get("quiet", False), values.get("debug", False))
        given = sources(ctx, values)
        for name in (name for name, about in described.items() if about.once):
            values[name] = _only(values[name], flag_of(kind, name))
        function(kind(**{name: _stored(value, hints[name]) for name, value in values.items()}, given=given))

    parameters = [_parameter("ctx", typer.Context)]
    for name, about in sorted(described.items(), key=lambda item: _place(kind, *item)):
        kept = fields[name].default
        annotation = _annotation(name, hints[name], about, name in kind.first_options)
        parameters.append(_parameter(name, annotation, _default(kept)))

    def read_config(ctx: typer.Context, path: Any) -> Any:
        return read_config_file(ctx, path, hints)

    config = Annotated[
        Any,
        typer.Option("--config", help=_CONFIG, callback=read_config, is_eager=True, metavar="FILE", parser=Path),
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


def _place(kind: type, name: str, about: Option) -> tuple[int, ...]:
    """Sorts options as `--help` shows them: arguments, the first options, the rest of the main ones, panel by panel."""
    first: tuple[str, ...] = kind.first_options  # type: ignore[attr-defined]
    rank = first.index(name) if name in first else len(first)
    return (not about.argument, rank, PANELS.index(about.panel))


def _annotation(name: str, hint: Any, about: Option, first: bool = False) -> Any:
    flags = (about.flag or "--" + name.replace("_", "-")).split(",")
    panel = None if first else about.panel
    details: dict[str, Any] = {"help": about.help, "rich_help_panel": panel}
    if about.min is not None:
        details["min"] = about.min
    if about.metavar is not None:
        details["metavar"] = about.metavar
    if about.choices:
        details.setdefault("metavar", "|".join(about.choices))
    if about.choices or about.complete:
        details["autocompletion"] = _completion(about.complete or (lambda: about.choices))
    item = str if about.once else _item(hint)
    if item is not None:
        hint = list[item] | None  # type: ignore[valid-type]
    if about.argument:
        return Annotated[hint, typer.Argument(**details)]
    # One name, so that a flag of its own brings no `--no-...`.
    return Annotated[hint, typer.Option(*flags, **details)]


def _completion(values: Callable[[], Iterable[str]]) -> Callable[[str], list[str]]:
    """What typer calls with the word before the cursor; the parts of a word with commas are completed one by one."""

    def complete(incomplete: str) -> list[str]:
        before, comma, part = incomplete.rpartition(",")
        return [f"{before}{comma}{value}" for value in values() if value.startswith(part)]

    return complete


def _only(values: list[Any] | None, flag: str) -> Any:
    """The value of an option that may be given once.

    Raises:
        ConfigError: it was given more than once.
    """
    if values and len(values) > 1:
        hint = "Give one of them; only `braces eval` takes several."
        raise ConfigError(f"given {len(values)} times", where=flag, hint=hint)
    return values[0] if values else None


def _item(hint: Any) -> Any:
    """X of `tuple[X, ...]`, the type of a repeatable option; None for every other type."""
    return get_args(hint)[0] if get_origin(hint) is tuple else None


def _stored(value: Any, hint: Any) -> Any:
    return value if _item(hint) is None else tuple(value or ())
