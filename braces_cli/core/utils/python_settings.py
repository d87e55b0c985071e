"""Settings that a script gives: values of the types that scripts have at hand, made into those of a settings class.

A path may be a text and a text a path, a repeatable setting one value or a list; numbers may be numpy's, and a number
format or device torch's own. Light: only the standard library.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Iterable, Mapping
from contextlib import suppress
from numbers import Integral, Real
from os import PathLike, fspath
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from braces_cli.core.utils.errors import ConfigError
from braces_cli.core.utils.other_names import setting_hint

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
