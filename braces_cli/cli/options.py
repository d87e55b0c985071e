"""All that braces uses of typer beyond what typer documents; a test names each of them and fails when one disappears.

typer.main.get_command       the parser behind an app, with `commands`, `params`, `context_settings` and `get_help`
NoArgsIsHelpError            the error of a call without arguments, whose message is the help; known by its class name
error.ctx.command_path       the command of a wrong call
error.option_name, .message  of an option that the command does not have
context.get_parameter_source, .default_map, .command.params (each with `name`, `opts`, `nargs` and `type.name`;
    options with `multiple`)

`--config FILE`: options of a command from a YAML file. Light: typer and the standard library.

Turn a function of one settings dataclass into a Typer command: its fields are the options.

    @command
    def merge(settings: MergeSettings) -> None: ...

Typer reads the options from a signature that is built here, so each option is declared once, as a field
(`core.config`), and a command inherits those that it shares with others. Light: typer and the standard library.

Groups of options that several commands inherit, each declared once. Light: the standard library only.

`--dry-run`: what a command would do, as a table or as JSON, the same for every command.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

from braces_cli.cli.output import print_json, print_pairs, set_up
from braces_cli.core.attributes.options import AttributeSettings as AttributeSettings
from braces_cli.core.attributes.options import strengths as strengths
from braces_cli.core.config import (
    MODEL,
    OUTPUT,
    PANELS,
    Option,
    SeedSettings,
    Settings,
    flag_of,
    option,
    options_of,
    setting_hint,
)
from braces_cli.core.distributed import check_variables
from braces_cli.core.errors import ConfigError
from braces_cli.core.models.options import ModelSettings as ModelSettings

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


_KINDS: dict[type, str] = {list: "list", dict: "mapping"}


def read_config_file(ctx: typer.Context, path: Path | str | None, types: Mapping[str, Any]) -> Path | None:
    """Make the file's settings the defaults of this command; what stands on the command line wins.

    Args:
        types: type of each setting.

    Raises:
        ConfigError: no such file, not YAML, a key that is no option of this command or that comes twice, a list for an
            option that takes one value, or a value of another type.
    """
    if path is None:
        return None
    path = Path(path)
    from braces_cli.core.schema import read_yaml  # msgspec, which a call without a file does not need

    settings = read_yaml(path, "Write one `key: value` a line.")
    # Some options carry a Python name of their own (`--format` is `fmt`), so keys are matched with what users type.
    known = parameters(ctx)
    names = {
        flag.lstrip("-").replace("-", "_"): name
        for name, parameter in known.items()
        for flag in parameter.opts
        if name not in ("config", "help")
    }
    defaults: dict[str, Any] = {}
    for key, value in settings.items():
        name = str(key).replace("-", "_")
        if name not in names:
            close = setting_hint(name, names).replace("_", "-")
            raise ConfigError(f"unknown key `{key}`", where=str(path), hint=close or "See --help for the options.")
        if names[name] in defaults:
            raise ConfigError(f"`{key}` is named twice", where=str(path), hint="Write each key once.")
        if is_repeatable(known[names[name]]):
            value = value if isinstance(value, list) or value is None else [value]
        elif isinstance(value, (list, dict)):
            hint = f"Write `{key}: VALUE`."
            raise ConfigError(f"`{key}` takes one value, not a {_KINDS[type(value)]}", where=str(path), hint=hint)
        defaults[names[name]] = value
    set_defaults(ctx, defaults)
    return path


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


@dataclass(frozen=True, kw_only=True)
class DisplaySettings(Settings):
    """How results are shown."""

    format: str = option("table", help="Format of stdout.", panel=OUTPUT, choices=("table", "json"), display=True)
    quiet: bool = option(False, help="Disable progress and log messages on stderr.", panel=OUTPUT, display=True)
    debug: bool = option(
        False, help="Print tracebacks and the logs of all libraries to stderr.", panel=OUTPUT, display=True
    )

    @property
    def json(self) -> bool:
        """Whether stdout carries JSON."""
        return self.format == "json"


@dataclass(frozen=True, kw_only=True)
class OutputSettings(SeedSettings, DisplaySettings):
    """What most commands have beside their own options."""

    dry_run: bool = option(
        False, help="Print the resolved settings and stop; writes nothing.", panel=OUTPUT, display=True
    )


@dataclass(frozen=True, kw_only=True)
class UploadSettings(Settings):
    """Where the output of a command is uploaded to."""

    push_to_hub: str | None = option(
        None,
        help="Hub repository (owner/name) for the output.",
        panel=OUTPUT,
        metavar="REPOSITORY",
        outcome=False,
    )


@dataclass(frozen=True, kw_only=True)
class AdapterSettings(ModelSettings):
    """The base model and the adapter of a command."""

    adapter: str | None = option(None, help="Adapter: folder or hub id.", metavar="ADAPTER", panel=MODEL, once=True)


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
