"""`--config FILE`: options of a command from a YAML file. Light: typer and the standard library."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

from braces_cli.cli.typer_internals import is_repeatable, parameters, set_defaults
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
