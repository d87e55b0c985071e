"""The boundary of settings: command line, YAML and Python arguments -> one frozen settings object.

    @dataclass(frozen=True, kw_only=True)
    class MergeSettings(AdapterSettings, OutputSettings):
        pad_to_multiple_of: int = option(64, help="Round the width of the FFN up to this.", min=1)

    settings = build(MergeSettings, {"pad_to_multiple_of": "256"}, file=Path("merge.yaml"))

A field declares an option: name, type, default, help text and limits. `cli.options` creates the options of a command
from the fields; the same names are keys in YAML. Code that receives the result of `build` does not check it again.
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
# In the order of the help page.
PANELS = (None, DATA, TASKS, METHOD, OPTIMISATION, ATTRIBUTES, GENERATION, SCORING, MODEL, CHECKPOINTS, OUTPUT)

# The largest whole number: the largest seed that every library accepts.
LARGEST = 2**32 - 1
_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path"}
# The words of YAML 1.1.
_TRUTH = {"yes": True, "on": True, "no": False, "off": False}
_SHOWN = 60

# Setting -> names in transformers' Trainer, trl, peft, lm-eval, llama.cpp or earlier versions. The first setting that
# the command has is suggested.
OTHER_NAMES: dict[str, str] = {
    "adapter": "lora peft",
    "baselines": "against",
    "batch_size": "eval_batch_size per_device_eval_batch_size per_device_train_batch_size",
    "output": "o out output_path",
    "output_dir": "o out output_path",
    "data": "dataset dataset_name file train_data train_file",
    "dtype": "bf16 fp16 torch_dtype",
    "epochs": "num_epochs num_train_epochs",
    "eval_data": "validation_file",
    "gradient_accumulation": "gradient_accumulation_steps",
    "lora_alpha": "alpha",
    "lora_targets": "lora_target_modules target_modules",
    "lr": "learning_rate",
    "max_length": "cutoff_len max_seq_len max_seq_length",
    "max_new_tokens": "max_tokens n n_predict",
    "model": "base_model m model_args model_name model_name_or_path pretrained",
    "num_samples": "num_return_sequences",
    "prompt": "p",
    "prompts": "dataset dataset_name f file",
    "quantize": "load_in_4bit load_in_8bit",
    "rank": "lora_r r",
    "reference_model": "judge_model",
    "resume": "resume_from_checkpoint",
    "s": "alpha scale strength",
    "schedule": "lr_scheduler_type",
    "show_unsteered": "beside",
    "temperature": "temp",
}


@dataclass(frozen=True)
class Option:
    """Help text and limits of a setting.

    Attributes:
        help: one or two sentences; a default other than None is added.
        panel: heading in `--help`; None for the most important options, which come first.
        flag: name of the option, if it is not the name of the field; several with commas, or `--x/--no-x`.
        min: smallest number, or length of a text.
        above: exclusive lower limit of a number.
        max: largest number.
        choices: allowed texts.
        spellings: other names of choices.
        metavar: placeholder of the value in `--help`.
        outcome: another value changes the result, so that a run cannot be resumed with it.
        display: the setting only changes what is printed; it is not recorded.
        argument: positional argument on the command line.
        once: one value, for an option that is repeatable in other commands; a second value is an error.
        complete: values for shell completion; for a comma-separated option, of each part.
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
    """Return a dataclass field that is an option; `details` are attributes of `Option`."""
    return field(default=default, metadata={"option": Option(help, **details)})


def same_option(kind: type, name: str) -> Any:
    """Return a copy of the field `name` of another settings class."""
    original = kind.__dataclass_fields__[name]  # type: ignore[attr-defined]
    return field(default=original.default, metadata=original.metadata)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Base of every command's settings.

    Attributes:
        first_options: names of the settings that `--help` shows first, in this order.
        required: names of the settings that a run needs and a dry run does not need.
        given: source of each setting without its default: `command line` or `file`.
    """

    first_options: ClassVar[tuple[str, ...]] = ()
    required: ClassVar[tuple[str, ...]] = ()

    given: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)

    def check(self) -> None:
        """Check combinations of settings; called once, by `build`. Raises ConfigError."""
        for name in () if getattr(self, "dry_run", False) else self.required:
            if getattr(self, name) in (None, ()):
                raise ConfigError("missing option", where=flag_of(type(self), name), hint="See --help.")

    def resolved(self) -> dict[str, Any]:
        """Return all settings except display settings, as JSON values."""
        return {name: plain(getattr(self, name)) for name, about in options_of(type(self)).items() if not about.display}


@dataclass(frozen=True, kw_only=True)
class SeedSettings(Settings):
    """Setting that makes a run reproducible."""

    seed: int = option(0, help="Seed of every random choice.", min=0, panel=OUTPUT)


def build(kind: type[T], values: Mapping[str, Any], file: Path | None = None, python: bool = False) -> T:
    """Build the settings of a command from `values`, the YAML `file` and defaults, in this order of precedence.

    Args:
        kind: a dataclass with options as fields.
        values: from the command line or, if `python` is on, from a script.

    Raises:
        ConfigError: an unknown name, an invalid or missing value, an invalid combination, or a file that is not YAML.
    """
    sources: list[tuple[Mapping[str, Any], str, Path | None]] = [(values, "command line", None)]
    if file is not None:
        sources.insert(0, (read_yaml(user_path(file)), "file", file))
    names, hints, found, given = names_of(kind), get_type_hints(kind), {}, {}
    for mapping, source, path in sources:
        for key, value in mapping.items():
            name = names.get(str(key).replace("-", "_"))
            if name is None:
                what = f"no setting `{key}`" if path is None else f"unknown key `{key}`"
                hint = setting_hint(str(key), names) or "See --help for the options."
                hint = hint if path is None else hint.replace("_", "-")
                raise ConfigError(what, where=None if path is None else str(path), hint=hint)
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
    """Convert a value from any source to the type of field `name` of `kind`; raises ConfigError."""
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
    """Convert numpy's numbers, paths, torch's dtypes and words for true and false to types that msgspec knows."""
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
        with suppress(TypeError):  # a tensor with one number is an Iterable
            items = list(value)
            # Layers may be numbers: [0, 1] or range(8, 20).
            if items and all(isinstance(each, Integral) and not isinstance(each, bool) for each in items):
                return ",".join(str(int(each)) for each in items)
            return items[0] if len(items) == 1 else items
    return value


def _schema(hint: Any, about: Option) -> Any:
    """Return the type with its limits for msgspec."""
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
    """Return X for `X`, `X | None` and `tuple[X, ...]`."""
    return next((part for part in get_args(hint) if part not in (type(None), ...)), hint)


def options_of(kind: type) -> dict[str, Option]:
    """Return the options of a dataclass by field name."""
    return {f.name: f.metadata["option"] for f in dataclasses.fields(kind) if "option" in f.metadata}


def flags_of(kind: type, name: str) -> list[str]:
    """Return the command-line options of field `name`, such as `--max-steps`."""
    return (options_of(kind)[name].flag or "--" + name.replace("_", "-")).split(",")


def flag_of(kind: type, name: str) -> str:
    """Return the name of field `name` in messages: its option or positional argument."""
    about = options_of(kind)[name]
    if about.argument:
        return about.metavar or name.upper()
    return flags_of(kind, name)[0].partition("/")[0]


def names_of(kind: type) -> dict[str, str]:
    """Return name in YAML and Python, with underscores -> field."""
    found = {}
    for name in options_of(kind):
        flags = [flag.partition("/")[0].lstrip("-").replace("-", "_") for flag in flags_of(kind, name)]
        found.update(dict.fromkeys([*flags, name], name))
    return found


def matching_setting(name: str, known: Collection[str]) -> str | None:
    """Return the setting in `known` for the name of another tool or of an earlier version, else None."""
    key = name.lstrip("-").replace("-", "_")
    return next((each for each, names in OTHER_NAMES.items() if each in known and key in names.split()), None)


def setting_hint(name: str, known: Collection[str]) -> str:
    """Return a hint with the likely settings in `known`, or an empty string."""
    setting = matching_setting(name, known)
    return f"Use `{setting}`." if setting else near_misses(name, known)


def plain(value: Any) -> Any:
    """Return a setting as a JSON value."""
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
