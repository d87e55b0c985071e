"""Options that several commands share, each declared once. Light: only typer and the standard library."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from braces_cli.core.utils.errors import ConfigError, near_misses


class Format(StrEnum):
    table = "table"
    json = "json"


class Dtype(StrEnum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Quantisation(StrEnum):
    int8 = "int8"
    int4 = "int4"
    bnb_8bit = "bnb-8bit"
    bnb_4bit = "bnb-4bit"


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
    known = {p.name: p for p in ctx.command.params if p.name not in (None, "config", "help")}
    defaults: dict[str, Any] = {}
    for key, value in settings.items():
        name = str(key).replace("-", "_")
        # Some options carry a Python name of their own (`--format` is `fmt`), so look at what users type, too.
        names = {opt.lstrip("-").replace("-", "_"): n for n, p in known.items() for opt in p.opts}
        if name not in names:
            close = near_misses(name, names).replace("_", "-")
            raise ConfigError(f"unknown key `{key}`", where=str(path), hint=close or "See --help for the options.")
        # YAML reads `packing: off` as false.
        choice = known[names[name]].default
        if isinstance(value, bool) and isinstance(choice, StrEnum) and {"on", "off"} <= set(type(choice)):
            value = "on" if value else "off"
        defaults[names[name]] = value
    ctx.default_map = {**(ctx.default_map or {}), **defaults}
    return path


Config = Annotated[
    Path | None,
    typer.Option(
        "--config", help="YAML file with options of this command; the command line wins.", callback=read_config_file,
        is_eager=True,
    ),
]  # fmt: skip
Model = Annotated[
    str | None,
    typer.Option("--model", help="Base: folder or hub id. Default: the adapter's own, else the embedded model."),
]
AdapterName = Annotated[str | None, typer.Option("--adapter", help="Adapter: folder or hub id.")]
Revision = Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit of a hub model.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda (or cuda:1) or mps.")]
DtypeOption = Annotated[Dtype, typer.Option("--dtype", help="Of the base; auto is the checkpoint's own.")]
DeviceMap = Annotated[
    str | None, typer.Option("--device-map", help="`auto` spreads a base over several devices (accelerate).")
]
Quantize = Annotated[
    Quantisation | None,
    typer.Option("--quantize", help="Pack the base while loading: int8, int4 with torchao, bnb-* with bitsandbytes."),
]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that a hub model brings.")]
Seed = Annotated[int, typer.Option("--seed", help="Of every random choice.", min=0)]
FormatOption = Annotated[Format, typer.Option("--format", help="What stdout carries.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress and no notes on stderr.")]
Debug = Annotated[bool, typer.Option("--debug", help="Tracebacks, and every library's log, on stderr.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Write into an output folder that is not empty.")]
Layers = Annotated[str | None, typer.Option("--layers", help="Such as 8-20,24 or 1- (inclusive, from 0).")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the resolved settings and stop; writes nothing.")]


def strengths(names: Any, s: Any) -> list[float]:
    """The strength of each attribute in `--attribute`, from `--s`.

    Raises:
        ConfigError: a name comes twice, the numbers do not match, or one is not finite.
    """
    if len(set(names)) < len(names):
        raise ConfigError("an attribute is named twice", where="--attribute", hint="Give each once, with one --s.")
    if len(s) not in (0, len(names)):
        hint = "The k-th --s belongs to the k-th --attribute; give one for each, or none at all."
        raise ConfigError(f"{len(s)} strengths for {len(names)} attributes", where="--s", hint=hint)
    for value in s:
        if not abs(value) < float("inf"):
            raise ConfigError(f"{value} is no finite number", where="--s", hint="Such as --s 3.0 or --s -1.5.")
    return list(s) or [1.0] * len(names)


def load_options(ctx: typer.Context) -> Any:
    """The `LoadOptions` among a command's parameters."""
    from braces_cli.core.session import LoadOptions

    names = ("revision", "device", "dtype", "device_map", "quantize", "trust_remote_code")
    return LoadOptions(**{name: _plain(ctx.params[name]) for name in names})


def resolved(ctx: typer.Context) -> dict[str, Any]:
    """Every setting of this call after file and command line are merged, ready for JSON."""
    skip = {"config", "debug", "quiet", "fmt", "dry_run"}
    return {name: _plain(value) for name, value in ctx.params.items() if name not in skip}


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, (Path, StrEnum)) else value
