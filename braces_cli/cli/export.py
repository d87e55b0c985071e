"""`braces export`: base + adapter -> what other programs serve: slots and LoRA files, code, control vectors."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from braces_cli.cli.merge import LABELS, readable
from braces_cli.cli.options import command, show_plan
from braces_cli.cli.output import print_json, print_pairs, progress
from braces_cli.core.attributes.options import AttributeSettings
from braces_cli.core.config import OUTPUT, option
from braces_cli.core.errors import ModelError
from braces_cli.core.options import (
    AdapterSettings,
    FolderSettings,
    ModelSettings,
    OutputSettings,
    OverwriteSettings,
    SteeredLayers,
)

app = typer.Typer(help="Export adapters and attributes for other programs to serve.", no_args_is_help=True)


@dataclass(frozen=True, kw_only=True)
class SlotsSettings(ModelSettings, OutputSettings, FolderSettings):
    """Settings of `braces export slots`."""

    first_options = ("model", "output_dir", "slots")
    required = ("output_dir",)

    slots: int = option(
        64,
        help="Minimum number of empty neurons per layer: one for attributes, the others for ranks of adapters.",
        min=2,
    )
    pad_to_multiple_of: int = option(
        64,
        help="Round the width of the FFN up to a multiple of this; 256 for llama.cpp's K-quants.",
        min=1,
        panel=OUTPUT,
    )


@command
def slots(settings: SlotsSettings) -> None:
    """Write the base with empty neurons, which LoRA files of `braces export lora` fill; logits stay as they are."""
    from braces_cli.export.request import Request
    from braces_cli.export.slots import describe_slots, write_slots

    request = Request(settings.model, None, settings, pad_to_multiple_of=settings.pad_to_multiple_of)
    if settings.dry_run:
        _print_plan(settings, lambda: describe_slots(request, settings.slots))
        return
    assert settings.output_dir is not None
    with progress(settings.quiet) as report:
        result = write_slots(
            request,
            settings.slots,
            settings.output_dir,
            settings.overwrite,
            report,
        )
    _show(settings, "exported", result)


@dataclass(frozen=True, kw_only=True)
class LoraSettings(AdapterSettings, AttributeSettings, SteeredLayers, OutputSettings, FolderSettings):
    """Settings of `braces export lora`."""

    first_options = ("base", "adapter", "attribute", "s", "output_dir")
    required = ("output_dir",)

    base: Path = option(help="Base with slots: folder written by `braces export slots`.")
    gguf: Path | None = option(None, help="Also write the LoRA to this GGUF file, for llama.cpp.")
    combine: bool = option(
        False,
        help="Write adapter and attributes at fixed strengths into one LoRA, for servers that apply one per request.",
    )
    first_slot: int = option(
        0,
        help="Number of slot ranks to skip, for other adapters that are active at the same time.",
        min=0,
        panel=OUTPUT,
    )


@command
def lora(settings: LoraSettings) -> None:
    """Write an adapter, or with --attribute an attribute, as a plain LoRA for a base with slots."""
    from braces_cli.export.lora import LoraRequest, describe_lora, write_lora

    lora_request = LoraRequest(_request(settings), settings.base, settings.combine, settings.first_slot)
    if settings.dry_run:
        _print_plan(settings, lambda: describe_lora(lora_request))
        return
    assert settings.output_dir is not None
    with progress(settings.quiet) as report:
        result = write_lora(lora_request, settings.output_dir, settings.gguf, settings.overwrite, report)
    _show(settings, "exported", result)


@dataclass(frozen=True, kw_only=True)
class CodeSettings(AdapterSettings, AttributeSettings, SteeredLayers, OutputSettings, FolderSettings):
    """Settings of `braces export code`."""

    first_options = ("adapter", "output_dir", "attribute", "s", "model")
    required = ("output_dir",)


@command
def code(settings: CodeSettings) -> None:
    """Write base and adapter as a checkpoint with a modelling file, for bases that cannot be merged."""
    if settings.dry_run:
        _print_plan(settings)
        return
    from braces_cli.export.code import write_code

    assert settings.output_dir is not None
    with progress(settings.quiet) as report:
        result = write_code(
            _request(settings),
            settings.output_dir,
            settings.overwrite,
            report,
        )
    _show(settings, "exported", result)


@dataclass(frozen=True, kw_only=True)
class VectorSettings(AdapterSettings, AttributeSettings, SteeredLayers, OverwriteSettings, OutputSettings):
    """Settings of `braces export control-vector`."""

    first_options = ("attribute", "s", "adapter", "output", "model")
    required = ("output",)

    output: Path | None = option(None, help="GGUF file to write.")


@command
def control_vector(settings: VectorSettings) -> None:
    """Write the steering of attributes as a GGUF control vector, which repeng and llama.cpp read."""
    if settings.dry_run:
        _print_plan(settings)
        return
    from braces_cli.core.files import output_lock
    from braces_cli.export.control_vector import check_export, export_control_vector
    from braces_cli.export.request import steering

    path = settings.output
    assert path is not None
    with output_lock(path):
        check_export(path, settings.overwrite)
        from braces_cli.core.adapter.model import open_session

        request = _request(settings)
        session = open_session(request.model, request.adapter, request.options)
        session.remove_adapter()
        terms, layers = steering(session, request)
        if request.adapter is not None:
            session.add_adapter(request.adapter)
        found = export_control_vector(session, terms, layers, path)
    _show(settings, "exported", {**found, "attributes": request.attributes})


for _name, _command in (("slots", slots), ("lora", lora), ("code", code), ("control-vector", control_vector)):
    app.command(_name)(_command)


def _print_plan(settings: OutputSettings, describe: Callable[[], dict[str, Any]] = dict) -> None:
    """Print the settings and what would be written, or why that cannot be said."""
    try:
        found = describe()
    except ModelError as error:
        found = {"trainable_parameters": None, "reason": str(error)}
    show_plan(settings, found)


def _request(settings: Any) -> Any:
    from braces_cli.core.adapter.model import resolve_adapter
    from braces_cli.export.request import Request

    return Request(
        model=settings.model,
        adapter=resolve_adapter(settings.adapter),
        options=settings,
        attributes=settings.strengths,
        attributes_dir=settings.attributes,
        layers=settings.layers,
    )


def _show(settings: OutputSettings, title: str, result: dict[str, Any]) -> None:
    if settings.json:
        print_json(result)
        return
    print_pairs(title, readable(result), LABELS)
