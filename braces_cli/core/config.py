"""Settings of a command as a frozen dataclass: one field per option, with its default, help text and panel beside it.

    @dataclass(frozen=True, kw_only=True)
    class SweepSettings(LoadSettings, OutputSettings):
        sweep: str = option(help="FROM:TO:STEP.", panel=GENERATION)

`braces_cli.cli.options` turns such a class into the options of a Typer command; the same names are keys in YAML.
Light: only the standard library.

Names of settings in other tools and in earlier versions, for the hints of errors.

Settings that a script gives: values of the types that scripts have at hand, made into those of a settings class.

A path may be a text and a text a path, a repeatable setting one value or a list; numbers may be numpy's, and a number
format or device torch's own. Light: only the standard library.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import MISSING, dataclass, field
from numbers import Integral, Real
from os import PathLike, fspath
from pathlib import Path
from typing import Any, ClassVar, Union, get_args, get_origin, get_type_hints

from braces_cli.core.errors import ConfigError, near_misses
from braces_cli.core.files import user_path

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


# Name in transformers' Trainer, trl, peft, lm-eval, llama.cpp or earlier versions -> candidates; the first one that the
# command has is used.
_SETTING_NAMES: dict[str, tuple[str, ...]] = {
    "against": ("baselines",),
    "alpha": ("lora_alpha", "s"),
    "base_model": ("model",),
    "beside": ("show_unsteered",),
    "bf16": ("dtype",),
    "cutoff_len": ("max_length",),
    "dataset": ("data", "prompts"),
    "dataset_name": ("data", "prompts"),
    "eval_batch_size": ("batch_size",),
    "f": ("prompts",),
    "file": ("prompts", "data"),
    "fp16": ("dtype",),
    "gradient_accumulation_steps": ("gradient_accumulation",),
    "judge_model": ("reference_model",),
    "learning_rate": ("lr",),
    "load_in_4bit": ("quantize",),
    "load_in_8bit": ("quantize",),
    "lora": ("adapter",),
    "lora_r": ("rank",),
    "lora_target_modules": ("lora_targets",),
    "lr_scheduler_type": ("schedule",),
    "m": ("model",),
    "max_seq_len": ("max_length",),
    "max_seq_length": ("max_length",),
    "max_tokens": ("max_new_tokens",),
    "model_args": ("model",),
    "model_name": ("model",),
    "model_name_or_path": ("model",),
    "n": ("max_new_tokens",),
    "n_predict": ("max_new_tokens",),
    "num_epochs": ("epochs",),
    "num_return_sequences": ("num_samples",),
    "num_train_epochs": ("epochs",),
    "o": ("output", "output_dir"),
    "out": ("output_dir", "output"),
    "output_path": ("output", "output_dir"),
    "p": ("prompt",),
    "peft": ("adapter",),
    "per_device_eval_batch_size": ("batch_size",),
    "per_device_train_batch_size": ("batch_size",),
    "pretrained": ("model",),
    "r": ("rank",),
    "resume_from_checkpoint": ("resume",),
    "scale": ("s",),
    "strength": ("s",),
    "target_modules": ("lora_targets",),
    "temp": ("temperature",),
    "torch_dtype": ("dtype",),
    "train_data": ("data",),
    "train_file": ("data",),
    "validation_file": ("eval_data",),
}


def matching_setting(name: str, known: Collection[str]) -> str | None:
    """Return the setting in `known` for the name of another tool or of an earlier version, else None."""
    key = name.lstrip("-").replace("-", "_")
    return next((setting for setting in _SETTING_NAMES.get(key, ()) if setting in known), None)


def setting_hint(name: str, known: Collection[str]) -> str:
    """Return a hint with the likely settings in `known`; an empty string if there is none."""
    setting = matching_setting(name, known)
    return f"Use `{setting}`." if setting else near_misses(name, known)


# Settings that name files of rows.
_ROWS = ("data", "eval_data")
_IN_A_FILE = "Write rows into a file and give its name, as with dataset.to_json('rows.jsonl')."
_WORDS = {bool: "True or False", int: "a whole number", float: "a number", str: "a text", Path: "a path"}


def from_python(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` as the fields of the dataclass `kind` hold them; None is no value of a repeatable setting.

    Raises:
        ConfigError: no such setting, or a value of another type.
    """
    hints = get_type_hints(kind)
    known = [each.name for each in dataclasses.fields(kind) if each.name != "given"]
    for name in values:
        if name not in known:
            raise ConfigError(f"no setting `{name}`", hint=setting_hint(name, known))
    none = {name: () for name, value in values.items() if value is None and get_origin(hints[name]) is tuple}
    return {name: converted(name, none.get(name, value), hints[name]) for name, value in values.items()}


def converted(name: str, value: Any, hint: Any) -> Any:
    """`value` as a setting of type `hint` holds it.

    Args:
        hint: bool, int, float, str or Path; that or None; or a tuple of them, `tuple[X, ...]`.

    Raises:
        ConfigError: the value has another type.
    """
    if get_origin(hint) is tuple:
        of = get_args(hint)[0]
        single = isinstance(value, (str, PathLike, Mapping)) or not isinstance(value, Iterable)
        return tuple(converted(name, item, of) for item in ([value] if single else value))
    if get_origin(hint) in (Union, types.UnionType):
        if value is None:
            return None
        hint = next(part for part in get_args(hint) if part is not type(None))
    found = _as(hint, value)
    if found is None:
        shown = repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:60]}..."
        advice = _IN_A_FILE if name in _ROWS and isinstance(value, Mapping) else None
        raise ConfigError(f"{shown} is not {_WORDS[hint]}", where=name, hint=advice)
    return found


def _as(kind: type, value: Any) -> Any:
    """`value` as a `kind`, None where it is none."""
    if kind is bool:
        return value if isinstance(value, bool) else None
    if kind in (int, float):
        number = isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
        with suppress(OverflowError):
            return kind(value) if number else None
        return None
    if isinstance(value, (str, PathLike)):
        return kind(fspath(value))
    if kind is str and type(value).__module__ == "torch" and type(value).__name__ in ("dtype", "device"):
        return str(value).removeprefix("torch.")
    return None


def layer_text(layers: Any) -> Any:
    """Layers given as numbers, 3, [0, 1] or range(8, 20), as the text that `--layers` takes; other values as they are.

    Raises:
        ConfigError: no layer at all.
    """
    numbers = [layers] if isinstance(layers, Integral) else layers
    if isinstance(layers, (str, bool, Mapping)) or not isinstance(numbers, Iterable):
        return layers
    numbers = list(numbers)
    if not numbers:
        raise ConfigError("no layers", where="layers", hint="Give at least one, or leave it out for the default.")
    plain = all(isinstance(each, Integral) and not isinstance(each, bool) for each in numbers)
    return ",".join(str(int(each)) for each in numbers) if plain else layers


def column_texts(columns: Any) -> Any:
    """Columns given as {"prompt": "question"}, as the texts that `--columns` takes; other values as they are."""
    return [f"{key}={column}" for key, column in columns.items()] if isinstance(columns, Mapping) else columns
