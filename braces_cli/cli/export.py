"""`braces merge` and `braces export`: base + adapter -> what other programs load without braces."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import typer

from braces_cli.cli.options import (
    AdapterSettings,
    AttributeSettings,
    ModelSettings,
    OutputSettings,
    UploadSettings,
    command,
    show_plan,
)
from braces_cli.cli.output import print_json, print_pairs, progress
from braces_cli.core.config import ATTRIBUTES, OUTPUT, Settings, option
from braces_cli.core.errors import ConfigError, ModelError

app = typer.Typer(help="Export adapters and attributes for other programs to serve.", no_args_is_help=True)

# Names of a result's fields in the table.
_LABELS = {
    "case": "written as",
    "max_logit_difference": "largest difference of a logit from base and adapter",
    "relative_difference": "the same over the largest logit",
    "rounding": "rounding error of the base's logits",
    "adapter_effect": "largest change of a logit by the adapter",
    "effect_missing": "share of the adapter's change that is lost",
    "probes": "probe prompts",
}
_CASES = {
    "a": "more neurons in the gated FFN",
    "b": "a Llama with more neurons in its FFN",
    "c": "pairs of neurons in the FFN without gate",
}


@dataclass(frozen=True, kw_only=True)
class FolderSettings(Settings):
    """Output folder."""

    output_dir: Path | None = option(None, help="Folder to write.")
    overwrite: bool = option(False, help="Overwrite an existing output.", panel=OUTPUT)


@dataclass(frozen=True, kw_only=True)
class SteeringSettings(AdapterSettings, AttributeSettings, OutputSettings):
    """Adapter, attributes, and the layers that are steered."""

    layers: str | None = option(
        None,
        help="Layers to steer, such as 8-20,24 or 1- (inclusive, from 0). Default: the layers of the steering "
        "vector, or all adapted layers for an attribute that the adapter was trained with.",
        panel=ATTRIBUTES,
    )


@dataclass(frozen=True, kw_only=True)
class WidthSettings(Settings):
    """Width of the FFN."""

    pad_to_multiple_of: int = option(
        64,
        help="Round the width of the FFN up to a multiple of this; 256 for llama.cpp's K-quants.",
        min=1,
        panel=OUTPUT,
    )


@dataclass(frozen=True, kw_only=True)
class MergeSettings(WidthSettings, UploadSettings, SteeringSettings, FolderSettings):
    """Settings of `braces merge`."""

    first_options = ("adapter", "output_dir", "attribute", "s", "model")

    check: Path | None = option(
        None, help="Folder of a merged checkpoint to verify again; writes nothing.", panel=OUTPUT
    )


@command
def merge(settings: MergeSettings) -> None:
    """Write base and adapter into one plain checkpoint that transformers, vLLM or llama.cpp load without braces."""
    from braces_cli.core.models.hub import check_push, push
    from braces_cli.export.checkpoint import MergeExport, check

    if settings.dry_run:
        _print_plan(settings, MergeExport(_adapter_request(settings), settings.pad_to_multiple_of))
        return
    if (settings.output_dir is None) == (settings.check is None):
        what = "missing option" if settings.check is None else "these options are mutually exclusive"
        raise ConfigError(what, where="--output-dir, --check", hint="Give one of the two.")
    if settings.check is not None:
        if settings.push_to_hub is not None:
            hint = "Leave out --push-to-hub, or merge into --output-dir."
            raise ConfigError("a check uploads nothing", where="--push-to-hub", hint=hint)
        _print_result(
            settings, "the merge is verified", check(_check_request(settings, settings.check), settings.check)
        )
        return
    if settings.push_to_hub is not None:
        check_push(settings.push_to_hub)
    result = _run(settings, MergeExport(_adapter_request(settings), settings.pad_to_multiple_of))
    if settings.push_to_hub is not None and settings.output_dir is not None:
        push(settings.output_dir, settings.push_to_hub)
    _print_result(settings, "merged", result)


@dataclass(frozen=True, kw_only=True)
class SlotsSettings(WidthSettings, ModelSettings, OutputSettings, FolderSettings):
    """Settings of `braces export slots`."""

    first_options = ("model", "output_dir", "slots")

    slots: int = option(
        64,
        help="Minimum number of empty neurons per layer: one for attributes, the others for ranks of adapters.",
        min=2,
    )


@command
def slots(settings: SlotsSettings) -> None:
    """Write the base with empty neurons, which LoRA files of `braces export lora` fill; logits stay as they are."""
    from braces_cli.export.run import Request
    from braces_cli.export.slots import SlotsExport

    request = Request(settings.model, None, settings.load_options)
    export = SlotsExport(request, settings.slots, settings.pad_to_multiple_of)
    if settings.dry_run:
        _print_plan(settings, export)
    else:
        _print_result(settings, "exported", _run(settings, export))


@dataclass(frozen=True, kw_only=True)
class LoraSettings(SteeringSettings, FolderSettings):
    """Settings of `braces export lora`."""

    first_options = ("base", "adapter", "attribute", "s", "output_dir")

    base: Path | None = option(None, help="Base with slots: folder written by `braces export slots`.")
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
    from braces_cli.export.lora import lora_export, write_lora

    base = _required(settings.base, "--base", "Name the folder that braces export slots wrote.")
    export = lora_export(_request(settings), base, settings.combine, settings.first_slot)
    if settings.dry_run:
        _print_plan(settings, export)
        return
    output = _required(settings.output_dir, "--output-dir", "Name the folder to write.")
    with progress(settings.quiet) as report:
        result = write_lora(export, output, settings.gguf, settings.overwrite, report)
    _print_result(settings, "exported", result)


@dataclass(frozen=True, kw_only=True)
class CodeSettings(SteeringSettings, FolderSettings):
    """Settings of `braces export code`."""

    first_options = ("adapter", "output_dir", "attribute", "s", "model")


@command
def code(settings: CodeSettings) -> None:
    """Write base and adapter as a checkpoint with a modelling file, for bases that cannot be merged."""
    from braces_cli.export.code import CodeExport

    export = CodeExport(_adapter_request(settings))
    if settings.dry_run:
        _print_plan(settings, export)
    else:
        _print_result(settings, "exported", _run(settings, export))


@dataclass(frozen=True, kw_only=True)
class VectorSettings(SteeringSettings):
    """Settings of `braces export control-vector`."""

    first_options = ("attribute", "s", "adapter", "output", "model")

    output: Path | None = option(None, help="GGUF file to write.")
    overwrite: bool = option(False, help="Overwrite an existing file.", panel=OUTPUT)


@command
def control_vector(settings: VectorSettings) -> None:
    """Write the steering of attributes as a GGUF control vector, which repeng and llama.cpp read."""
    if settings.dry_run:
        show_plan(settings)
        return
    from braces_cli.export.control_vector import write_control_vector

    output = _required(settings.output, "--output", "Name the GGUF file to write.")
    _print_result(settings, "exported", write_control_vector(_request(settings), output, settings.overwrite))


for _name, _command in (("slots", slots), ("lora", lora), ("code", code), ("control-vector", control_vector)):
    app.command(_name)(_command)


def _required(path: Path | None, flag: str, hint: str) -> Path:
    if path is None:
        raise ConfigError("missing option", where=flag, hint=hint)
    return path


def _request(settings: SteeringSettings) -> Any:
    """The export's Request."""
    from braces_cli.core.adapter.files import find_adapter
    from braces_cli.export.run import Request

    return Request(
        model=settings.model,
        adapter=None if settings.adapter is None else find_adapter(settings.adapter),
        options=settings.load_options,
        attributes=settings.strengths,
        attributes_dir=settings.attributes,
        layers=settings.layers,
    )


def _adapter_request(settings: SteeringSettings) -> Any:
    """The Request of an export that needs an adapter."""
    if settings.adapter is None:
        raise ConfigError("missing option", where="--adapter", hint="Name the adapter to export.")
    return _request(settings)


def _check_request(settings: MergeSettings, folder: Path) -> Any:
    """The Request of `--check`: options that are not given are those of the record in the folder."""
    from braces_cli.export.checkpoint import read_record

    record: Any = read_record(folder)
    if settings.adapter is None and "adapter" not in record:
        hint = "braces merge writes a record into its folders; give such a folder, or --adapter, too."
        raise ModelError("no checkpoint that braces merge wrote", where=str(folder), hint=hint)
    attributes_dir = settings.attributes
    if attributes_dir is None and not settings.attribute and record.get("attributes_dir"):
        attributes_dir = Path(record["attributes_dir"])
    names, strengths = settings.attribute, settings.s
    if not names:
        attributes = record.get("attributes", {})
        names, strengths = tuple(attributes), tuple(attributes.values())
    dtype = record.get("dtype", "auto") if settings.dtype == "auto" else settings.dtype
    return _request(
        replace(
            settings,
            model=settings.model or record.get("model"),
            adapter=settings.adapter or record["adapter"],
            attributes=attributes_dir,
            attribute=names,
            s=strengths,
            layers=settings.layers or record.get("layers"),
            dtype=dtype,
        )
    )


def _run(settings: Any, export: Any) -> dict[str, Any]:
    from braces_cli.export.run import run

    output = _required(settings.output_dir, "--output-dir", "Name the folder to write.")
    with progress(settings.quiet) as report:
        return run(export, output, settings.overwrite, report)


def _print_plan(settings: OutputSettings, export: Any) -> None:
    """Print the settings and the size of the output, or why there is none."""
    try:
        facts = export.describe()
    except ModelError as error:
        facts = {"trainable_parameters": None, "reason": str(error)}
    show_plan(settings, facts)


def _print_result(settings: OutputSettings, title: str, result: dict[str, Any]) -> None:
    if settings.json:
        print_json(result)
        return
    shown = dict(result)
    shown["attributes"] = ", ".join(f"{name} {s:+g}" for name, s in result.get("attributes", {}).items()) or None
    if "case" in result:
        shown["case"] = _CASES[result["case"]]
    if "effect_missing" in result:
        # Rounding may make it slightly negative.
        shown["effect_missing"] = f"{max(0.0, result['effect_missing']):.2%}"
    print_pairs(title, shown, _LABELS)
