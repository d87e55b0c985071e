"""Groups of options that several commands inherit, each declared once. Light: only typer and the standard library."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from braces_cli.cli.config_file import read_config_file
from braces_cli.core.models.load_options import LoadOptions, ModelSettings
from braces_cli.core.utils.errors import ConfigError
from braces_cli.core.utils.settings import ATTRIBUTES, OUTPUT, SeedSettings, Settings, option


@dataclass(frozen=True, kw_only=True)
class OutputSettings(SeedSettings):
    """How results are shown."""

    dry_run: bool = option(
        False, help="Print the resolved settings and stop; writes nothing.", panel=OUTPUT, display=True
    )
    format: str = option("table", help="What stdout carries.", panel=OUTPUT, choices=("table", "json"), display=True)
    quiet: bool = option(False, help="No progress and no notes on stderr.", panel=OUTPUT, display=True)
    debug: bool = option(False, help="Tracebacks, and the log of every library, on stderr.", panel=OUTPUT, display=True)

    @property
    def json(self) -> bool:
        """Whether stdout carries JSON."""
        return self.format == "json"


@dataclass(frozen=True, kw_only=True)
class AdapterSettings(ModelSettings):
    """The base model and the adapter of a command."""

    adapter: str | None = option(None, help="Adapter: folder or hub id.")


@dataclass(frozen=True, kw_only=True)
class AttributeSettings(Settings):
    """Which attributes steer, and how strongly."""

    attribute: tuple[str, ...] = option((), help="Name of an attribute to steer by. Repeatable.", metavar="NAME")
    s: tuple[float, ...] = option(
        (), help="Strength; the k-th belongs to the k-th --attribute. Default 1.", metavar="STRENGTH"
    )
    attributes: Path | None = option(None, help="Folder that attr-build wrote.", panel=ATTRIBUTES)

    @property
    def strengths(self) -> dict[str, float]:
        """Name -> strength.

        Raises:
            ConfigError: see `strengths`.
        """
        return dict(zip(self.attribute, strengths(self.attribute, self.s), strict=True))


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
