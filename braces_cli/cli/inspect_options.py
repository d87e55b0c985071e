"""Options that several subcommands of `braces inspect` inherit, and how they show tokens."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from braces_cli.cli.options import AdapterSettings, DisplaySettings
from braces_cli.core.utils.settings import OUTPUT, option


@dataclass(frozen=True, kw_only=True)
class InspectSettings(AdapterSettings, DisplaySettings):
    """Every subcommand that opens a base model, with or without an adapter."""


@dataclass(frozen=True, kw_only=True)
class LayerSettings(InspectSettings):
    """Which decoder layers are looked at."""

    layers: str | None = option(None, help="Decoder layers, such as 8-20,24 or 1- (inclusive, from 0). Default: all.")


@dataclass(frozen=True, kw_only=True)
class VectorSettings(LayerSettings):
    """Which vectors of the feed-forward layers are read as tokens; one JSON object per vector."""

    side: str = option(
        "value",
        help="Weight matrix: value (output of the neurons), gate or up (their input).",
        choices=("value", "gate", "up"),
    )
    format: str = option(
        "table", help="Format of stdout; json: JSON Lines.", panel=OUTPUT, choices=("table", "json"), display=True
    )


def tokens_cell(row: Mapping[str, Any]) -> str:
    """The tokens of a row in one cell, quoted so that spaces and newlines show."""
    return "  ".join(repr(token["token"])[1:-1] for token in row["tokens"])
