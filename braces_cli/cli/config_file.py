"""`--config FILE`: options of a command from a YAML file. Light: typer and the standard library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from braces_cli.core.utils.errors import ConfigError, near_misses


def read_config_file(ctx: typer.Context, path: Path | None) -> Path | None:
    """Make the file's settings the defaults of this command; what stands on the command line wins.

    Raises:
        ConfigError: no such file, not YAML, or a key that is no option of this command.
    """
    if path is None:
        return None
    import yaml

    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read: {error.strerror}", where=str(path), hint="Check --config.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ConfigError("not YAML", where=where, hint="Write one `key: value` a line.") from error
    settings = {} if settings is None else settings
    if not isinstance(settings, dict):
        raise ConfigError("not a mapping of settings", where=str(path), hint="Write one `key: value` a line.")
    known: dict[str, Any] = {p.name: p for p in ctx.command.params if p.name not in (None, "config", "help")}
    defaults: dict[str, Any] = {}
    for key, value in settings.items():
        name = str(key).replace("-", "_")
        # Some options carry a Python name of their own (`--format` is `fmt`), so look at what users type, too.
        names = {opt.lstrip("-").replace("-", "_"): n for n, p in known.items() for opt in p.opts}
        if name not in names:
            close = near_misses(name, names).replace("_", "-")
            raise ConfigError(f"unknown key `{key}`", where=str(path), hint=close or "See --help for the options.")
        # YAML reads `packing: off` as false.
        if isinstance(value, bool) and not known[names[name]].is_flag:
            value = "on" if value else "off"
        defaults[names[name]] = value
    ctx.default_map = {**(ctx.default_map or {}), **defaults}
    return path
