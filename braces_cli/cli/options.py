"""A function of one settings class as a Typer command: the fields of the class are its options.

    @command
    def merge(settings: MergeSettings) -> None: ...

Typer passes texts; `core.config.build` converts them, and those of the file of `--config`, to the settings.
"""

import inspect
from collections.abc import Callable, Collection
from dataclasses import MISSING
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from braces_cli.cli.output import print_result, set_up
from braces_cli.core.config import PANELS, build, options_of
from braces_cli.core.distributed import check_variables, is_main
from braces_cli.core.options import OutputSettings

_CONFIG = "YAML file with options of this command; the command line wins."
_METAVARS = {int: "INTEGER", float: "FLOAT", Path: "PATH", str: "TEXT"}


def command(function: Callable[[Any], None]) -> Callable[..., None]:
    """Return the Typer command that builds the settings of `function` and calls `function` with them."""
    kind = next(hint for name, hint in get_type_hints(function).items() if name != "return")
    first, options = kind.first_options, options_of(kind)

    def run(ctx: typer.Context, config: str | None = None, **values: Any) -> None:
        check_variables()
        present = {name: value for name, value in values.items() if value not in (None, [])}
        settings = build(kind, present, Path(config) if config else None)
        set_up(settings.quiet or not is_main(), settings.debug)
        function(settings)

    annotations: dict[str, Any] = {"ctx": typer.Context}
    # Order in `--help`: arguments, the first options, the other main options, then panel by panel.
    leading = [name for name, about in options.items() if about.argument] + list(first)
    others = [name for name in options if name not in leading]
    others.sort(key=lambda name: PANELS.index(options[name].panel))
    for name in [*leading, *others]:
        about = options[name]
        silent = about.default is None or about.default is False or about.default in ((), MISSING)
        details: dict[str, Any] = {
            "help": about.help + ("" if silent else f" Default: {about.default}."),
            "rich_help_panel": None if name in first else about.panel,
        }
        if about.type is not bool:
            details["metavar"] = about.metavar or "|".join(about.choices) or _METAVARS[about.type]
        # With explicit names Typer adds no `--no-...`.
        typed = typer.Argument(**details) if about.argument else typer.Option(*about.flag.split(","), **details)
        received: Any = list[str] if about.many or about.once else bool if about.type is bool else str
        annotations[name] = Annotated[received | None, typed]
    annotations["config"] = Annotated[str | None, typer.Option("--config", help=_CONFIG, metavar="FILE")]
    parameters = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=None)
        for name, annotation in annotations.items()
    ]
    parameters[0] = parameters[0].replace(default=inspect.Parameter.empty)
    run.__name__, run.__doc__, run.__module__ = function.__name__, function.__doc__, function.__module__
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = annotations
    return run


def show_plan(settings: OutputSettings, facts: dict[str, Any] | None = None, unused: Collection[str] = ()) -> None:
    """Print the settings of a dry run.

    Args:
        facts: derived values, such as the number of parameters.
        unused: settings without an effect in this run, which the table omits.
    """
    resolved, facts = settings.resolved(), facts or {}
    shown = (
        {"settings": resolved} if settings.json else {k: v for k, v in resolved.items() if k not in (*facts, *unused)}
    )
    print_result(settings.json, "dry run, nothing is written", {**facts, **shown})
