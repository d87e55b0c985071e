"""A function of one settings class as a Typer command: the fields of the class are its options.

    @command
    def merge(settings: MergeSettings) -> None: ...

Typer hands over texts; `core.config.build` makes the settings of them, of the file of `--config`, and of the defaults.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any, get_origin, get_type_hints

import typer

from braces_cli.cli.output import print_json, print_pairs, set_up
from braces_cli.core.config import PANELS, Option, build, flags_of, item_type, options_of
from braces_cli.core.distributed import check_variables
from braces_cli.core.options import OutputSettings

_CONFIG = "YAML file with options of this command; the command line wins."
_METAVARS = {int: "INTEGER", float: "FLOAT", Path: "PATH", str: "TEXT"}
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
    kind = next(hint for name, hint in get_type_hints(function).items() if name != "return")
    hints, described = get_type_hints(kind), options_of(kind)

    def run(ctx: typer.Context, config: str | None = None, **values: Any) -> None:
        check_variables()
        settings = build(
            kind, {k: v for k, v in values.items() if v not in (None, [])}, Path(config) if config else None
        )
        set_up(settings.quiet, settings.debug)
        function(settings)

    parameters = [_parameter("ctx", typer.Context)]
    for name, about in sorted(described.items(), key=lambda item: _place(kind, *item)):
        default = kind.__dataclass_fields__[name].default
        parameters.append(_parameter(name, _annotation(kind, name, hints[name], about, default), None))
    config = Annotated[str | None, typer.Option("--config", help=_CONFIG, metavar="FILE")]
    parameters.append(_parameter("config", config, None))
    run.__name__, run.__doc__, run.__module__ = function.__name__, function.__doc__, function.__module__
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _parameter(name: str, annotation: Any, default: Any = inspect.Parameter.empty) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)


def _place(kind: type, name: str, about: Option) -> tuple[int, ...]:
    """Sorts options as `--help` shows them: arguments, the first options, the rest of the main ones, panel by panel."""
    first: tuple[str, ...] = kind.first_options  # type: ignore[attr-defined]
    rank = first.index(name) if name in first else len(first)
    return (not about.argument, rank, PANELS.index(about.panel))


def _annotation(kind: Any, name: str, hint: Any, about: Option, default: Any) -> Any:
    of = item_type(hint)
    silent = default is None or default is False or default in ((), dataclasses.MISSING)
    shown = "" if silent else f" Default: {default}."
    details: dict[str, Any] = {
        "help": about.help + shown,
        "rich_help_panel": None if name in kind.first_options else about.panel,
    }
    if of is not bool:
        details["metavar"] = about.metavar or "|".join(about.choices) or _METAVARS[of]
    if about.choices or about.complete:
        details["autocompletion"] = _completion(about.complete or (lambda: about.choices))
    many = about.once or get_origin(hint) is tuple
    given: Any = list[str] if many else bool if of is bool else str
    if about.argument:
        return Annotated[given | None, typer.Argument(**details)]
    # One name, so that a flag of its own brings no `--no-...`.
    return Annotated[given | None, typer.Option(*flags_of(kind, name), **details)]


def _completion(values: Callable[[], Iterable[str]]) -> Callable[[str], list[str]]:
    """What typer calls with the word before the cursor; the parts of a word with commas are completed one by one."""

    def complete(incomplete: str) -> list[str]:
        before, comma, part = incomplete.rpartition(",")
        return [f"{before}{comma}{value}" for value in values() if value.startswith(part)]

    return complete


def show_plan(settings: OutputSettings, facts: dict[str, Any] | None = None, unused: Collection[str] = ()) -> None:
    """Print what is known of the run, and its settings.

    Args:
        facts: what was found out, such as the number of parameters.
        unused: settings without effect in this run, which a table leaves out.
    """
    resolved, facts = settings.resolved(), facts or {}
    if settings.json:
        print_json({**facts, "settings": resolved})
        return
    shown = {name: value for name, value in resolved.items() if name not in unused and name not in facts}
    print_pairs("dry run, nothing is written", {**facts, **shown})
