"""Settings that a script gives: values of the types that scripts have at hand, made into those of a settings class.

A path may be a text and a text a path, a repeatable setting one value, a list or a mapping; numbers may be numpy's, and
a number format or device torch's own. Light: only the standard library.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from os import PathLike, fspath
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from braces_cli.core.utils.errors import ConfigError
from braces_cli.core.utils.other_names import setting_hint

_WORDS = {bool: "True or False", int: "a whole number", float: "a number", str: "a text", Path: "a path"}


def from_python(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` as the fields of the dataclass `kind` hold them.

    Raises:
        ConfigError: no such setting, or a value of another type.
    """
    hints = get_type_hints(kind)
    known = [each.name for each in dataclasses.fields(kind) if each.name != "given"]
    for name in values:
        if name not in known:
            raise ConfigError(f"no setting `{name}`", hint=setting_hint(name, known))
    return {name: converted(name, value, hints[name]) for name, value in values.items()}


def converted(name: str, value: Any, hint: Any) -> Any:
    """`value` as a setting of type `hint` holds it.

    Args:
        hint: bool, int, float, str or Path; that or None; or a tuple of them, `tuple[X, ...]`.

    Raises:
        ConfigError: the value has another type.
    """
    if get_origin(hint) is tuple:
        of = get_args(hint)[0]
        if isinstance(value, Mapping):
            value = [f"{key}={item}" for key, item in value.items()]
        single = isinstance(value, (str, PathLike)) or not isinstance(value, Iterable)
        return tuple(converted(name, item, of) for item in ([value] if single else value))
    if get_origin(hint) in (Union, types.UnionType):
        if value is None:
            return None
        hint = next(part for part in get_args(hint) if part is not type(None))
    found = _as(hint, _layers(value) if name == "layers" else value)
    if found is None:
        rows = "Write rows into a file and give its name, as with dataset.to_json('rows.jsonl')."
        what = f"{str(value)[:60]!r} is not {_WORDS[hint]}"
        raise ConfigError(what, where=name, hint=rows if isinstance(value, Mapping) else None)
    return found


def _as(kind: type, value: Any) -> Any:
    """`value` as a `kind`, None where it is none."""
    number = isinstance(value, Real) and not isinstance(value, bool)
    if kind is bool:
        return value if isinstance(value, bool) else None
    if kind is int:
        return int(value) if number and isinstance(value, Integral) else None
    if kind is float:
        return float(value) if number else None
    if isinstance(value, (str, PathLike)):
        return kind(fspath(value))
    if kind is str and type(value).__module__ == "torch":
        return str(value).removeprefix("torch.")
    return None


def _layers(value: Any) -> Any:
    """3, [0, 1] and range(8, 20) as the text that `--layers` takes."""
    places = [value] if isinstance(value, Integral) else value
    listed = isinstance(places, (list, tuple, range)) and all(isinstance(each, Integral) for each in places)
    return ",".join(map(str, places)) if listed else value
