"""`braces merge`: base + adapter -> a checkpoint that needs no braces."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from braces_cli.cli.command import command
from braces_cli.cli.console import print_json, print_pairs, progress
from braces_cli.cli.options import AdapterSettings, AttributeSettings, OutputSettings
from braces_cli.core.utils.errors import ConfigError, ModelError
from braces_cli.core.utils.settings import ATTRIBUTES, OUTPUT, option


@dataclass(frozen=True, kw_only=True)
class MergeSettings(AdapterSettings, AttributeSettings, OutputSettings):
    """Settings of `braces merge`."""

    output_dir: Path | None = option(None, help="Folder for the merged checkpoint.")
    overwrite: bool = option(False, help="Write into an output folder that is not empty.", panel=OUTPUT)
    layers: str | None = option(
        None, help="Layers that are steered, such as 8-20,24 or 1- (inclusive, from 0).", panel=ATTRIBUTES
    )
    pad_to_multiple_of: int = option(
        64,
        help="Round the width of the FFN up to a multiple of this; 256 for llama.cpp's K-quants.",
        min=1,
        panel=OUTPUT,
    )
    check: Path | None = option(None, help="Verify this merged folder once more; writes nothing.", panel=OUTPUT)


@command
def merge(settings: MergeSettings) -> None:
    """Write base and adapter into one plain checkpoint that transformers, vLLM or llama.cpp load without braces."""
    if settings.dry_run:
        print_json({"settings": settings.resolved(), **_planned(settings)})
        return
    if (settings.output_dir is None) == (settings.check is None):
        what = "missing option" if settings.check is None else "either writes or checks"
        raise ConfigError(what, where="--output-dir, --check", hint="Give one of the two.")

    from braces_cli.export import merge as core

    with progress(settings.quiet) as report:
        if settings.check is not None:
            result = core.check(_request(settings, core.read_record(settings.check)), settings.check)
        else:
            assert settings.output_dir is not None
            result = core.merge(_request(settings), settings.output_dir, settings.overwrite, report)
    if settings.json:
        print_json(result)
        return
    shown = ", ".join(f"{name} {s:+g}" for name, s in result["attributes"].items()) or None
    print_pairs("the merge is verified" if settings.check is not None else "merged", {**result, "attributes": shown})


def _request(settings: MergeSettings, record: dict[str, Any] | None = None) -> Any:
    """The request of this call; where it checks a folder, what is not given is what the folder says."""
    from dataclasses import replace

    from braces_cli.core.method.adapter_files import find_adapter
    from braces_cli.export.request import Request

    options, record = settings.load_options, record or {}
    adapter = settings.adapter or record.get("adapter")
    if adapter is None:
        raise ConfigError("missing option", where="--adapter", hint="Name the adapter that is to be merged.")
    if record and options.dtype == "auto":
        options = replace(options, dtype=record.get("dtype", "auto"))
    return Request(
        model=settings.model or record.get("model"),
        adapter=find_adapter(adapter),
        options=options,
        attributes=settings.strengths or record.get("attributes", {}),
        attributes_dir=settings.attributes,
        layers=settings.layers or record.get("layers"),
        pad_to_multiple_of=settings.pad_to_multiple_of,
    )


def _planned(settings: MergeSettings) -> dict[str, Any]:
    """What would be written, or why that cannot be said."""
    if settings.adapter is None:
        return {"trainable_parameters": None, "reason": "no adapter given"}
    from braces_cli.export.merge import describe

    try:
        return describe(_request(settings))
    except ModelError as error:
        return {"trainable_parameters": None, "reason": str(error)}
