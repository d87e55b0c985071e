"""Groups of options that several commands inherit, each declared once. Light: the standard library only."""

from __future__ import annotations

from dataclasses import dataclass

from braces_cli.core.attributes.attribute_options import AttributeSettings as AttributeSettings
from braces_cli.core.attributes.attribute_options import strengths as strengths
from braces_cli.core.models.load_options import ModelSettings as ModelSettings
from braces_cli.core.utils.settings import MODEL, OUTPUT, SeedSettings, Settings, option


@dataclass(frozen=True, kw_only=True)
class DisplaySettings(Settings):
    """How results are shown."""

    format: str = option("table", help="Format of stdout.", panel=OUTPUT, choices=("table", "json"), display=True)
    quiet: bool = option(False, help="Disable progress and log messages on stderr.", panel=OUTPUT, display=True)
    debug: bool = option(
        False, help="Print tracebacks and the logs of all libraries to stderr.", panel=OUTPUT, display=True
    )

    @property
    def json(self) -> bool:
        """Whether stdout carries JSON."""
        return self.format == "json"


@dataclass(frozen=True, kw_only=True)
class OutputSettings(SeedSettings, DisplaySettings):
    """What most commands have beside their own options."""

    dry_run: bool = option(
        False, help="Print the resolved settings and stop; writes nothing.", panel=OUTPUT, display=True
    )


@dataclass(frozen=True, kw_only=True)
class UploadSettings(Settings):
    """Where the output of a command is uploaded to."""

    push_to_hub: str | None = option(
        None,
        help="Hub repository (owner/name) for the output.",
        panel=OUTPUT,
        metavar="REPOSITORY",
        outcome=False,
    )


@dataclass(frozen=True, kw_only=True)
class AdapterSettings(ModelSettings):
    """The base model and the adapter of a command."""

    adapter: str | None = option(None, help="Adapter: folder or hub id.", metavar="ADAPTER", panel=MODEL, once=True)
