"""The one boundary of settings: command line, YAML and Python arguments -> one frozen settings object.

    @dataclass(frozen=True, kw_only=True)
    class MergeSettings(AdapterSettings, OutputSettings):
        pad_to_multiple_of: int = option(64, help="Round the width of the FFN up to this.", min=1)

    settings = build(MergeSettings, {"pad_to_multiple_of": "256"}, file=Path("merge.yaml"))

A field is the only declaration of an option: name, type, default, help text and limits. `braces_cli.cli.options` makes
the options of a command of it; the same names are keys in YAML. Whatever `build` returns is valid; code that receives
it checks nothing again.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import MISSING, dataclass, field
from numbers import Integral, Real
from os import PathLike, fspath
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args, get_origin, get_type_hints

import msgspec

from braces_cli.core.errors import ConfigError, near_misses
from braces_cli.core.files import user_path
from braces_cli.core.schema import read_yaml

T = TypeVar("T")

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
_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path"}
# As YAML 1.1 has them, and many people.
_TRUTH = {"yes": True, "on": True, "no": False, "off": False}
_SHOWN = 60

# Name in transformers' Trainer, trl, peft, lm-eval, llama.cpp or earlier versions -> candidates; the first one that the
# command has is used.
SETTING_NAMES: dict[str, tuple[str, ...]] = {
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


@dataclass(frozen=True)
class Option:
    """What the command line shows of a setting, and which values it may have.

    Attributes:
        help: one or two sentences; the default is added where it is not None.
        panel: heading in `--help`; None is for the few options that matter most, which come first.
        flag: name of the option, where it is not the field's own with dashes; several names have commas between them,
            and `--x/--no-x` is an option that can be switched off.
        min: smallest value of a number, or length of a text.
        above: a number must be greater than this.
        max: largest value of a number.
        choices: the values that a text setting may have.
        spellings: other names of choices.
        metavar: what stands for the value in `--help`.
        outcome: whether another value makes another result; if not, a run may be resumed with another value.
        display: whether the setting only says how results are shown; such settings are not recorded anywhere.
        argument: given by position, without a name; a file names it like any other.
        once: the command takes one value where other commands take several; a second one is an error.
        complete: values that a shell offers after Tab; of a comma-separated option, each of its parts.
    """

    help: str = ""
    panel: str | None = None
    flag: str | None = None
    min: float | None = None
    above: float | None = None
    max: float | None = None
    choices: tuple[str, ...] = ()
    spellings: Mapping[str, str] = field(default_factory=dict)
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
        required: names of the settings that a run needs and a dry run does not.
        given: where each setting that is not at its default was named: `command line` or `file`.
    """

    first_options: ClassVar[tuple[str, ...]] = ()
    required: ClassVar[tuple[str, ...]] = ()

    given: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)

    def check(self) -> None:
        """Refuse settings that do not go together; `build` calls it once.

        Raises:
            ConfigError: names one of them.
        """
        for name in () if getattr(self, "dry_run", False) else self.required:
            if getattr(self, name) in (None, ()):
                raise ConfigError("missing option", where=flag_of(type(self), name), hint="See --help.")

    def resolved(self) -> dict[str, Any]:
        """Every setting after file and command line are merged, ready for JSON."""
        return {name: plain(getattr(self, name)) for name, about in options_of(type(self)).items() if not about.display}


@dataclass(frozen=True, kw_only=True)
class SeedSettings(Settings):
    """What makes a run repeatable."""

    seed: int = option(0, help="Seed of every random choice.", min=0, panel=OUTPUT)


def build(kind: type[T], values: Mapping[str, Any], file: Path | None = None, python: bool = False) -> T:
    """The settings of a command: `values`, then those of the YAML `file`, then defaults.

    Args:
        kind: a dataclass with options as fields.
        values: given by the command line or, where `python` is on, by a script.

    Raises:
        ConfigError: an unknown name, a value of another type or out of its range, no value where one is needed, or
            settings that do not go together; or a file that is no YAML.
    """
    sources: list[tuple[Mapping[str, Any], str, Path | None]] = [(values, "command line", None)]
    if file is not None:
        sources.insert(0, (read_yaml(user_path(file), "Write one `key: value` a line."), "file", file))
    names, hints, found, given = names_of(kind), get_type_hints(kind), {}, {}
    for mapping, source, path in sources:
        named = set()
        for key, value in mapping.items():
            name = names.get(str(key).replace("-", "_"))
            if name is None:
                what = f"no setting `{key}`" if path is None else f"unknown key `{key}`"
                hint = setting_hint(str(key), names) or "See --help for the options."
                hint = hint if path is None else hint.replace("_", "-")
                raise ConfigError(what, where=None if path is None else str(path), hint=hint)
            if name in named:
                raise ConfigError(f"`{key}` is named twice", where=str(path), hint="Write each key once.")
            named.add(name)
            if value is None and (path is not None or get_origin(hints[name]) is tuple):
                continue
            where = f"{path}: {key}" if path is not None else key if python else flag_of(kind, name)
            found[name] = convert(kind, name, value, where)
            given[name] = source
    for each in dataclasses.fields(kind):  # type: ignore[arg-type]
        if each.name not in found and each.default is MISSING and each.default_factory is MISSING:
            raise ConfigError("missing", where=flag_of(kind, each.name), hint="See --help.")
    if not issubclass(kind, Settings):
        return kind(**found)
    settings = kind(**found, given=given)
    settings.check()
    return settings


def convert(kind: type, name: str, value: Any, where: str) -> Any:
    """A value from any source as field `name` of `kind` holds it.

    Raises:
        ConfigError: it has another type, or is out of its range.
    """
    hint, about = _hints(kind)[name], options_of(kind)[name]
    of = item_type(hint)
    many = get_origin(hint) is tuple
    if many:
        if isinstance(value, Mapping) and of is str and about.metavar and "=" in about.metavar:
            value = [f"{key}={item}" for key, item in value.items()]
        single = isinstance(value, (str, PathLike, Mapping)) or not isinstance(value, Iterable)
        raw: Any = [] if value is None else [_simple(item, of) for item in ([value] if single else value)]
    else:
        raw = _simple(value, of)
    if about.spellings and isinstance(raw, str):
        raw = about.spellings.get(raw, raw)
    try:
        found = msgspec.convert(raw, _schema(hint, about), strict=False, dec_hook=lambda _, text: user_path(text))
    except (msgspec.ValidationError, OverflowError, UnicodeEncodeError) as error:
        found = error
    numbers = found if many and not isinstance(found, Exception) else [found]
    if isinstance(found, Exception) or any(isinstance(each, float) and not math.isfinite(each) for each in numbers):
        advice = near_misses(str(raw), about.choices)
        if isinstance(raw, list) and not many:
            advice = "It takes one value."
        elif name in ("data", "eval_data"):
            advice = "Write rows into a file and give its name, as with dataset.to_json('rows.jsonl')."
        raise ConfigError(f"{_shown(value)} is not {_expected(of, about)}", where=where, hint=advice or None)
    return found


def _simple(value: Any, of: type) -> Any:
    """A value of the types that scripts and YAML have at hand, for msgspec: numpy's numbers, paths, torch's dtypes."""
    if of is bool and isinstance(value, str):
        return _TRUTH.get(value.lower(), value)
    if isinstance(value, str) and of in (int, float):
        with suppress(ValueError):
            return of(value)
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, PathLike):
        return fspath(value)
    if isinstance(value, Real):
        number = int(value) if isinstance(value, Integral) else value
        with suppress(OverflowError):
            return str(number) if of is str else number if isinstance(number, int) else float(number)
    if of is str and type(value).__module__ == "torch" and type(value).__name__ in ("dtype", "device"):
        return str(value).removeprefix("torch.")
    if of is str and not isinstance(value, (str, Mapping)) and isinstance(value, Iterable):
        with suppress(TypeError):  # a number of torch's calls itself iterable
            items = list(value)
            # Layers may be numbers: [0, 1] or range(8, 20).
            if items and all(isinstance(each, Integral) and not isinstance(each, bool) for each in items):
                return ",".join(str(int(each)) for each in items)
            return items[0] if len(items) == 1 else items
    return value


def _schema(hint: Any, about: Option) -> Any:
    """The type with its limits, as msgspec takes it."""
    of = item_type(hint)
    kind: Any = Literal[about.choices] if about.choices else of
    limits: dict[str, Any] = {"ge": about.min, "gt": about.above, "le": about.max}
    limits = {name: limit for name, limit in limits.items() if limit is not None}
    if of is int:
        limits = {"ge": -LARGEST, "le": LARGEST} | limits
    if of is str and limits:
        limits = {"min_length": limits["ge"]}
    if limits:
        kind = Annotated[kind, msgspec.Meta(**limits)]
    if get_origin(hint) is tuple:
        return tuple[kind, ...]
    return kind | None if type(None) in get_args(hint) else kind


def _expected(of: type, about: Option) -> str:
    if about.choices:
        return f"one of {', '.join(about.choices)}"
    limits = (("at least", about.min), ("more than", about.above), ("at most", about.max))
    ranges = [f"{words} {limit:g}" for words, limit in limits if limit is not None and of is not str]
    return " of ".join([_WORDS[of], *([" and ".join(ranges)] if ranges else [])])


def _shown(value: Any) -> str:
    text = repr(value) if not isinstance(value, str) else f"`{value}`"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def item_type(hint: Any) -> Any:
    """X of `X`, `X | None` and `tuple[X, ...]`."""
    return next((part for part in get_args(hint) if part not in (type(None), ...)), hint)


def options_of(kind: type) -> dict[str, Option]:
    """The options among a dataclass's fields, by field name."""
    return {f.name: f.metadata["option"] for f in dataclasses.fields(kind) if "option" in f.metadata}


def flags_of(kind: type, name: str) -> list[str]:
    """The options that set field `name`, such as `--max-steps`."""
    return (options_of(kind)[name].flag or "--" + name.replace("_", "-")).split(",")


def flag_of(kind: type, name: str) -> str:
    """The option that sets field `name`, as messages call it."""
    about = options_of(kind)[name]
    if about.argument:
        return about.metavar or name.upper()
    return flags_of(kind, name)[0].partition("/")[0]


def names_of(kind: type) -> dict[str, str]:
    """Name of a setting in YAML and Python, with underscores -> field."""
    found = {}
    for name in options_of(kind):
        flags = [flag.partition("/")[0].lstrip("-").replace("-", "_") for flag in flags_of(kind, name)]
        found.update(dict.fromkeys([*flags, name], name))
    return found


def matching_setting(name: str, known: Collection[str]) -> str | None:
    """Return the setting in `known` for the name of another tool or of an earlier version, else None."""
    key = name.lstrip("-").replace("-", "_")
    return next((setting for setting in SETTING_NAMES.get(key, ()) if setting in known), None)


def setting_hint(name: str, known: Collection[str]) -> str:
    """Return a hint with the likely settings in `known`; an empty string if there is none."""
    setting = matching_setting(name, known)
    return f"Use `{setting}`." if setting else near_misses(name, known)


def plain(value: Any) -> Any:
    """A setting as JSON holds it."""
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def parse_ranges(text: str, count: int, option: str) -> list[int]:
    """Return the sorted indices of ranges such as `8-20,24` or `1-` (inclusive, from 0, below `count`).

    Raises:
        ConfigError: not a list of ranges, or out of range.
    """
    chosen: set[int] = set()
    for part in (part.strip() for part in text.split(",")):
        found = re.fullmatch(r"(\d{1,9})(-(\d{1,9})?)?", part, re.ASCII)
        if found is None:
            raise ConfigError(f"`{part}` is neither a number nor a range", where=option, hint="Such as 8-20,24 or 1-.")
        low = int(found[1])
        high = int(found[3]) if found[3] else count - 1 if found[2] else low
        if low > high or high >= count:
            raise ConfigError(f"`{part}` is out of range", where=option, hint=f"The range is 0 to {count - 1}.")
        chosen.update(range(low, high + 1))
    return sorted(chosen)


def format_ranges(indices: Collection[int]) -> str:
    """Return ranges such as `8-20,24`, as `parse_ranges` reads them."""
    runs: list[list[int]] = []
    for index in sorted(indices):
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
