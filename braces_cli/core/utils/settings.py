"""Settings of a command as a frozen dataclass: one field per option, with its default, help text and panel beside it.

    @dataclass(frozen=True, kw_only=True)
    class SweepSettings(LoadSettings, OutputSettings):
        sweep: str = option(help="FROM:TO:STEP.", panel=GENERATION)

`braces_cli.cli.command` turns such a class into the options of a Typer command; the same names are keys in YAML.
Light: only the standard library.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from braces_cli.core.utils.errors import ConfigError, near_misses
from braces_cli.core.utils.paths import user_path

# Panels of `--help`.
DATA = "Data"
MODEL = "Model"
METHOD = "Method"
OPTIMISATION = "Optimisation"
ATTRIBUTES = "Attributes"
GENERATION = "Generation"
TASKS = "Tasks"
SCORING = "Scoring"
CHECKPOINTS = "Checkpoints"
OUTPUT = "Output"
# In the order in which a command's page shows them.
PANELS = (None, DATA, TASKS, METHOD, OPTIMISATION, ATTRIBUTES, GENERATION, SCORING, MODEL, CHECKPOINTS, OUTPUT)

# Of whole numbers: the largest seed that every library takes, and more than any count.
LARGEST = 2**32 - 1


@dataclass(frozen=True)
class Option:
    """What the command line shows of a setting.

    Attributes:
        help: one or two sentences; the default is added where it is not None.
        panel: heading in `--help`; None is for the few options that matter most, which come first.
        flag: name of the option, where it is not the field's own with dashes; several names have commas between them,
            and `--x/--no-x` is an option that can be switched off.
        min: smallest value of a number.
        choices: the values that a text setting may have, or the parts of a comma-separated one.
        metavar: what stands for the value in `--help`.
        outcome: whether another value makes another result; if not, a run may be resumed with another value.
        display: whether the setting only says how results are shown; such settings are not recorded anywhere.
        argument: given by position, without a name; a file names it like any other.
        once: the command takes one value where other commands take several; a second one is an error.
        complete: values that a shell offers after Tab; of a comma-separated option, each of its parts.
    """

    help: str
    panel: str | None = None
    flag: str | None = None
    min: float | None = None
    choices: tuple[str, ...] = ()
    metavar: str | None = None
    outcome: bool = True
    display: bool = False
    argument: bool = False
    once: bool = False
    complete: Callable[[], Iterable[str]] | None = None


def option(default: Any = MISSING, *, help: str, **details: Any) -> Any:
    """A dataclass field that is an option; `details` are the attributes of `Option`."""
    return field(default=default, metadata={"option": Option(help, **details)})


def same_option(kind: type, name: str) -> Any:
    """The field `name` of another settings class once more, for a command that needs few of that class's options."""
    original = kind.__dataclass_fields__[name]  # type: ignore[attr-defined]
    return field(default=original.default, metadata=original.metadata)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Base of every command's settings.

    Attributes:
        first_options: names of the settings that `--help` shows first, in this order.
        given: where each setting that is not at its default was named: `command line` or `file`.
    """

    first_options: ClassVar[tuple[str, ...]] = ()

    given: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, about in options_of(type(self)).items():
            value = getattr(self, name)
            if isinstance(value, Path):
                # Shells expand `~` at the start of a word only; here, so that it is the same for reading and writing.
                object.__setattr__(self, name, user_path(value))
            if isinstance(value, int) and abs(value) > LARGEST:
                hint = f"Give at most {LARGEST}."
                raise ConfigError("the number is too large", where=flag_of(type(self), name), hint=hint)
            if about.min is not None and isinstance(value, (int, float)) and value < about.min:
                hint = f"Give at least {about.min:g}."
                raise ConfigError(f"{value} is out of range", where=flag_of(type(self), name), hint=hint)
            if about.choices and value is not None and value not in about.choices:
                close = near_misses(str(value), about.choices)
                hint = close or f"One of {', '.join(about.choices)}."
                raise ConfigError(f"no {name.replace('_', ' ')} `{value}`", where=flag_of(type(self), name), hint=hint)

    def resolved(self) -> dict[str, Any]:
        """Every setting after file and command line are merged, ready for JSON."""
        return {name: plain(getattr(self, name)) for name, about in options_of(type(self)).items() if not about.display}

    def shared(self, kind: type) -> Any:
        """The part of these settings that `kind`, another dataclass with fields of the same names, holds."""
        return kind(**{f.name: getattr(self, f.name) for f in dataclasses.fields(kind) if hasattr(self, f.name)})


@dataclass(frozen=True, kw_only=True)
class SeedSettings(Settings):
    """What makes a run repeatable."""

    seed: int = option(0, help="Seed of every random choice.", min=0, panel=OUTPUT)


def options_of(kind: type) -> dict[str, Option]:
    """The options among a settings class's fields, by field name."""
    return {f.name: f.metadata["option"] for f in dataclasses.fields(kind) if "option" in f.metadata}


def flag_of(kind: type, name: str) -> str:
    """The option that sets field `name`, such as `--max-steps`."""
    about = options_of(kind)[name]
    if about.argument:
        return about.metavar or name.upper()
    return (about.flag or "--" + name.replace("_", "-")).partition(",")[0].partition("/")[0]


def plain(value: Any) -> Any:
    """A setting as JSON holds it."""
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
