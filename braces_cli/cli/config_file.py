"""`--config FILE`: options of a command from a YAML file. Light: typer and the standard library."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import typer

from braces_cli.cli.typer_internals import parameters, set_defaults
from braces_cli.core.utils.errors import ConfigError, near_misses

_BOOL = "tag:yaml.org,2002:bool"


def read_config_file(ctx: typer.Context, path: Path | str | None) -> Path | None:
    """Make the file's settings the defaults of this command; what stands on the command line wins.

    Raises:
        ConfigError: no such file, not YAML, or a key that is no option of this command.
    """
    if path is None:
        return None
    path = Path(path)
    settings = _mapping(path)
    # Some options carry a Python name of their own (`--format` is `fmt`), so keys are matched with what users type.
    names = {
        flag.lstrip("-").replace("-", "_"): name
        for name, parameter in parameters(ctx).items()
        for flag in parameter.opts
        if name not in ("config", "help")
    }
    defaults: dict[str, Any] = {}
    for key, value in settings.items():
        name = str(key).replace("-", "_")
        if name not in names:
            close = near_misses(name, names).replace("_", "-")
            raise ConfigError(f"unknown key `{key}`", where=str(path), hint=close or "See --help for the options.")
        defaults[names[name]] = value
    set_defaults(ctx, defaults)
    return path


def _mapping(path: Path) -> dict[Any, Any]:
    """The keys and values of a YAML file."""
    import yaml

    class Loader(yaml.SafeLoader):
        """Of YAML 1.2, in which only true and false are truth values: `packing: off` is the word."""

    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != _BOOL]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    Loader.add_implicit_resolver(_BOOL, re.compile("^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
    try:
        settings = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except OSError as error:
        raise ConfigError(f"cannot read: {error.strerror}", where=str(path), hint="Check --config.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ConfigError("not YAML", where=where, hint="Write one `key: value` a line.") from error
    if settings is not None and not isinstance(settings, dict):
        raise ConfigError("not a mapping of settings", where=str(path), hint="Write one `key: value` a line.")
    return settings or {}
