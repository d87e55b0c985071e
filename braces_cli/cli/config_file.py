"""`--config FILE`: options of a command from a YAML file. Light: typer and the standard library."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import typer

from braces_cli.cli.typer_internals import is_repeatable, parameters, set_defaults
from braces_cli.core.utils.decoding import cut
from braces_cli.core.utils.errors import ConfigError
from braces_cli.core.utils.other_names import setting_hint

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
    settings = _mapping(path)
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
            raise ConfigError(f"unknown key `{cut(key)}`", where=str(path), hint=close or "See --help for the options.")
        if names[name] in defaults:
            raise ConfigError(f"`{key}` is named twice", where=str(path), hint="Write each key once.")
        if is_repeatable(known[names[name]]):
            value = value if isinstance(value, list) or value is None else [value]
        elif isinstance(value, (list, dict)):
            hint = f"Write `{key}: VALUE`."
            raise ConfigError(f"`{key}` takes one value, not a {_KINDS[type(value)]}", where=str(path), hint=hint)
        for item in value if isinstance(value, list) else [value]:
            _check_value(str(key), item, _plain_type(types[names[name]]), path)
        defaults[names[name]] = value
    set_defaults(ctx, defaults)
    return path


def _plain_type(hint: Any) -> Any:
    """X of `X`, `X | None` and `tuple[X, ...]`."""
    return next((part for part in get_args(hint) if part not in (type(None), ...)), hint)


def _check_value(key: str, value: Any, kind: Any, path: Path) -> None:
    """Refuse what the parser would convert into something else, such as 3.7 into 3, or stumble over.

    Text that should be a number is the parser's to refuse.
    """
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    wanted = None
    if value is None or (isinstance(value, str) and "\0" not in value):
        return
    if kind is int:
        wanted = None if number and value == value // 1 else "a whole number"
    elif kind is float:
        wanted = None if number else "a number"
    elif kind is bool:
        wanted = None if isinstance(value, bool) or value in (0, 1) else "true or false"
    elif not number:
        wanted = "text"
    if wanted is not None:
        from braces_cli.core.utils.documents import line_of_setting

        hint = f"Write `{key}: '...'`." if wanted == "text" else f"Write `{key}: VALUE`."
        shown = cut(json.dumps(value, default=str))
        raise ConfigError(
            f"`{key}` is {shown}, expected {wanted}",
            where=line_of_setting(path, key),
            hint=hint,
        )


def _mapping(path: Path) -> dict[str, Any]:
    """The keys and values of a YAML file."""
    from braces_cli.core.utils.documents import Kind, read  # msgspec, which a call without a file does not need

    hint = "Write one `key: value` a line."
    settings = read(Kind(object, ConfigError, hint, syntax="yaml"), path)
    if settings is not None and not isinstance(settings, dict):
        raise ConfigError("not a mapping of settings", where=str(path), hint=hint)
    return settings or {}
