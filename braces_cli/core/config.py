"""The boundary of settings: command line, YAML and Python arguments -> one frozen settings object.

    @dataclass(frozen=True, kw_only=True)
    class MergeSettings(AdapterSettings, OutputSettings):
        '''Settings of `braces merge`.

        Attributes:
            pad_to_multiple_of: Round the width of the FFN up to a multiple of this.
        '''

        pad_to_multiple_of: int = option(64, min=1)

    settings = build(MergeSettings, {"pad_to_multiple_of": "256"}, file=Path("merge.yaml"))

A field declares an option: name, type, default and limits. Its entry under `Attributes:` is the help text.
`cli.options` creates the options of a command from the fields; the same names are keys in YAML. Code that receives the
result of `build` does not check it again.
"""

import dataclasses
import inspect
import math
import re
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import MISSING, dataclass, field
from numbers import Integral, Real
from os import PathLike, fspath
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args, get_origin, get_type_hints

import msgspec

from braces_cli.core.errors import ConfigError, logger, near_misses
from braces_cli.core.files import user_path, versions, write_text
from braces_cli.core.schema import cut, read_yaml

T = TypeVar("T")

# Name of the settings in an output folder, and the key of what the run was made with.
SETTINGS_FILE = "settings.yaml"
_MADE_WITH = "made_with"
# Not repeated by `--config`: places of results, and permission to run code of other people.
_NOT_REPEATED = ("output_dir", "output", "plot", "overwrite", "resume", "push_to_hub", "trust_remote_code")

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

# Setting -> names in transformers' Trainer, trl, peft, lm-eval, llama.cpp or earlier commits that are not similar to
# it. The first setting that the command has is suggested.
OTHER_NAMES: dict[str, str] = {
    "adapter": "lora peft",
    "baselines": "against",
    "output": "o out",
    "output_dir": "o out",
    "data": "file train_file",
    "dtype": "bf16 fp16",
    "lora_alpha": "alpha",
    "lr": "learning_rate",
    "max_length": "cutoff_len",
    "max_new_tokens": "n n_predict",
    "model": "base_model m model_name_or_path pretrained",
    "num_samples": "num_return_sequences",
    "prompt": "p",
    "prompts": "f file",
    "quantize": "load_in_4bit load_in_8bit",
    "rank": "lora_r r",
    "reference_model": "judge_model",
    "resume": "resume_from_checkpoint",
    "s": "alpha scale strength",
    "schedule": "lr_scheduler_type",
    "show_unsteered": "beside",
}


@dataclass(frozen=True)
class Option:
    """An option: how it appears on the command line, and what it accepts.

    Attributes:
        panel: heading in `--help`; None for the most important options, which come first.
        flag: names of the option with commas, or `--x/--no-x`; by default the name of the field.
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
        help: one or two sentences from the docstring of the class; `--help` adds a default other than None.
        label: name in messages, such as `--max-steps`.
        keys: names in YAML and Python.
        type: X of `X`, `X | None` and `tuple[X, ...]`.
        many: the setting is a tuple.
        schema: type with limits, for msgspec.
        default: value without a source.
    """

    panel: str | None = None
    flag: str = ""
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
    # Set by `options_of`.
    help: str = ""
    label: str = ""
    keys: tuple[str, ...] = ()
    type: Any = str
    many: bool = False
    schema: Any = str
    default: Any = None


def option(default: Any = MISSING, **details: Any) -> Any:
    """Return a dataclass field that is an option; `details` are attributes of `Option`."""
    return field(default=default, metadata={"option": Option(**details)})


def same_option(kind: type, name: str) -> Any:
    """Return a copy of the field `name` of another settings class, with the help text."""
    original = options_of(kind)[name]
    return field(default=original.default, metadata={"option": original})


def options_of(kind: type) -> dict[str, Option]:
    """Return the options of a settings class by field name."""
    hints, found = get_type_hints(kind), {}
    # Entries under `Attributes:` in the docstrings of the class and its bases.
    documents = [inspect.cleandoc(vars(each).get("__doc__") or "") for each in reversed(kind.__mro__)]
    entries = re.findall(r"^    (\w+): (.+(?:\n {8}.+)*)", "\n".join(documents), re.MULTILINE)
    texts = {name: " ".join(text.split()) for name, text in entries}
    for each in dataclasses.fields(kind):
        about, hint = each.metadata.get("option"), hints[each.name]
        if about is None:
            continue
        flag = about.flag or "--" + each.name.replace("_", "-")
        names = [name.partition("/")[0] for name in flag.split(",")]
        of = next((part for part in get_args(hint) if part not in (type(None), ...)), hint)
        limits: dict[str, Any] = {"ge": about.min, "gt": about.above, "le": about.max}
        limits = {name: limit for name, limit in limits.items() if limit is not None}
        if of is int:
            limits = {"ge": -LARGEST, "le": LARGEST} | limits
        elif of is str and limits:
            limits = {"min_length": about.min}
        schema: Any = Literal[about.choices] if about.choices else of
        schema = Annotated[schema, msgspec.Meta(**limits)] if limits else schema
        many = get_origin(hint) is tuple
        found[each.name] = dataclasses.replace(
            about,
            flag=flag,
            help=texts.get(each.name, about.help),
            label=about.metavar or each.name.upper() if about.argument else names[0],
            keys=(each.name, *(name.lstrip("-").replace("-", "_") for name in names)),
            type=of,
            many=many,
            schema=tuple[schema, ...] if many else schema | None if type(None) in get_args(hint) else schema,
            default=each.default,
        )
    return found


def flag_of(kind: type, name: str) -> str:
    """Return the name of field `name` in messages: its option or positional argument."""
    return options_of(kind)[name].label


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Base of every command's settings.

    Class attributes: `first_options` are the settings that `--help` shows first, in this order; `required` are the
    settings that a run needs and a dry run does not need. `given` is the source of each setting without its default:
    `command line` or `file`; `made_with` is what `write_settings` stored in that file about its run.
    """

    first_options: ClassVar[tuple[str, ...]] = ()
    required: ClassVar[tuple[str, ...]] = ()

    given: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)
    made_with: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)

    def check(self) -> None:
        """Check combinations of settings; called once, by `build`. Raises ConfigError."""
        for name in () if getattr(self, "dry_run", False) else self.required:
            if getattr(self, name) in (None, ()):
                raise ConfigError("missing option", where=flag_of(type(self), name), hint="See --help.")

    def resolved(self) -> dict[str, Any]:
        """Return all settings except display settings, as JSON values."""
        found = {}
        for name, about in options_of(type(self)).items():
            if not about.display:
                value = getattr(self, name)
                found[name] = list(value) if about.many else str(value) if isinstance(value, Path) else value
        return found


def write_settings(path: Path, settings: Settings, unused: Collection[str] = (), **hashes: str | None) -> None:
    """Write the settings of a run as YAML for `--config`, with the versions of libraries and hashes of what was read.

    For settings that come from such a file, a message says which versions and hashes differ.

    Args:
        unused: names of settings without an effect.
        hashes: hash of each input; None if it is unknown.
    """
    import yaml  # here, so that `--help` does not import it

    now = {**versions(), **{name: value for name, value in hashes.items() if value is not None}}
    different = [
        f"{name} {before[:12]}, now {now.get(name, 'none')[:12]}"
        for name, before in settings.made_with.items()
        if now.get(name) != before
    ]
    if different:
        logger.warning("the run of the settings file had %s", "; ".join(different))
    left_out = {*_NOT_REPEATED, *unused}
    kept = {
        name: value for name, value in settings.resolved().items() if name not in left_out and value not in (None, [])
    }
    write_text(path, yaml.safe_dump({**kept, _MADE_WITH: now}, sort_keys=False, allow_unicode=True))


def build(kind: type[T], values: Mapping[str, Any], file: Path | None = None, python: bool = False) -> T:
    """Build the settings of a command from `values`, the YAML `file` and defaults, in this order of precedence.

    Args:
        kind: a dataclass with options as fields.
        values: from the command line or, if `python` is on, from a script.

    Raises:
        ConfigError: an unknown name, an invalid or missing value, an invalid combination, or a file that is not YAML.
    """
    options = options_of(kind)
    names = {key: name for name, about in options.items() for key in about.keys}
    found, given = {}, {}
    content = read_yaml(user_path(file)) if file else {}
    made_with = content.pop(_MADE_WITH) if isinstance(content.get(_MADE_WITH), Mapping) else {}
    for mapping, source in ((content, "file"), (values, "command line")):
        for key, value in mapping.items():
            name = names.get(str(key).replace("-", "_"))
            if name is None:
                setting = matching_setting(str(key), names)
                hint = f"Use `{setting}`." if setting else near_misses(str(key), names)
                what, where = "no setting", None
                if source == "file":
                    what, where, hint = "unknown key", str(file), hint.replace("_", "-")
                raise ConfigError(f"{what} `{key}`", where=where, hint=hint or "See --help for the options.")
            if value is None and (source == "file" or options[name].many):
                continue
            where = f"{file}: {key}" if source == "file" else key if python else options[name].label
            found[name], given[name] = convert(options[name], value, where), source
    for name, about in options.items():
        if name not in found and about.default is MISSING:
            raise ConfigError("missing", where=about.label, hint="See --help.")
    if not issubclass(kind, Settings):
        return kind(**found)
    made_with = {str(name): str(value) for name, value in made_with.items()}
    settings = kind(**found, given=given, made_with=made_with)
    settings.check()
    return settings


def convert(about: Option, value: Any, where: str) -> Any:
    """Convert a value from any source to the type of an option; raises ConfigError."""
    if not about.many:
        raw = _simple(value, about.type)
        raw = about.spellings.get(raw, raw) if about.spellings and isinstance(raw, str) else raw
    elif isinstance(value, Mapping) and about.metavar and "=" in about.metavar:
        raw = [f"{key}={item}" for key, item in value.items()]
    else:
        single = isinstance(value, (str, PathLike, Mapping)) or not isinstance(value, Iterable)
        raw = [_simple(item, about.type) for item in ([value] if single else value)]
    try:
        found = msgspec.convert(raw, about.schema, strict=False, dec_hook=lambda _, text: user_path(text))
        if all(math.isfinite(each) for each in (found if about.many else [found]) if isinstance(each, float)):
            return found
    except (msgspec.ValidationError, OverflowError, UnicodeEncodeError):
        pass
    hint = near_misses(str(raw), about.choices)
    if isinstance(raw, list) and not about.many:
        hint = "It takes one value."
    elif "data" in about.keys:
        hint = "Write rows into a file and give its name, as with dataset.to_json('rows.jsonl')."
    shown = f"`{cut(value)}`" if isinstance(value, str) else cut(repr(value))
    if about.choices:
        expected = f"one of {', '.join(about.choices)}"
    else:
        limits = (("at least", about.min), ("more than", about.above), ("at most", about.max))
        ranges = " and ".join(f"{words} {limit:g}" for words, limit in limits if limit is not None)
        expected = _WORDS[about.type] + (f" of {ranges}" if ranges and about.type is not str else "")
    raise ConfigError(f"{shown} is not {expected}", where=where, hint=hint or None)


def _simple(value: Any, of: type) -> Any:
    """Convert numpy's numbers, paths, torch's dtypes and words for true and false to types that msgspec knows."""
    if isinstance(value, str):
        if of in (int, float):
            with suppress(ValueError):
                return of(value)
        return _TRUTH.get(value.lower(), value) if of is bool else value
    if isinstance(value, (bool, Mapping)) or value is None:
        return value
    if isinstance(value, PathLike):
        return fspath(value)
    if isinstance(value, Real):
        number = int(value) if isinstance(value, Integral) else float(value)
        return str(number) if of is str else number
    if of is str and type(value).__module__ == "torch" and type(value).__name__ in ("dtype", "device"):
        return str(value).removeprefix("torch.")
    if of is str and isinstance(value, Iterable):
        with suppress(TypeError):  # a tensor with one number is an Iterable
            items = list(value)
            # Layers may be numbers: [0, 1] or range(8, 20).
            if items and all(isinstance(each, Integral) and not isinstance(each, bool) for each in items):
                return ",".join(str(int(each)) for each in items)
            return items[0] if len(items) == 1 else items
    return value


def matching_setting(name: str, known: Collection[str]) -> str | None:
    """Return the setting in `known` for the name of another tool, else None."""
    key = name.lstrip("-").replace("-", "_")
    return next((each for each, names in OTHER_NAMES.items() if each in known and key in names.split()), None)


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
