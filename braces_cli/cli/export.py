"""`braces merge` and `braces export`: base + adapter -> what other programs load without braces."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import typer

from braces_cli.cli.options import command, show_plan
from braces_cli.cli.output import print_json, print_pairs, progress
from braces_cli.core import options
from braces_cli.core.attributes.options import AttributeNames, AttributeSettings
from braces_cli.core.config import ATTRIBUTES, OUTPUT, Settings, option
from braces_cli.core.errors import ConfigError, ModelError
from braces_cli.core.models.hub import is_gguf

app = typer.Typer(help="Export adapters and attributes for other programs to serve.", no_args_is_help=True)

# Names of a result's fields in the table.
_CASES = {
    "a": "more neurons in the gated FFN",
    "b": "a Llama with more neurons in its FFN",
    "c": "pairs of neurons in the FFN without gate",
    "plain": "the weights of the GGUF file",
    "values": "edited value vectors",
}


@dataclass(frozen=True, kw_only=True)
class SteeringSettings(options.AdapterSettings, AttributeSettings, options.SteeredLayers, options.OutputSettings):
    """Base, adapter and attributes."""


@dataclass(frozen=True, kw_only=True)
class WidthSettings(Settings):
    """Width of the FFN.

    Attributes:
        pad_to_multiple_of: Round the width of the FFN up to a multiple of this; 256 for llama.cpp's K-quants.
    """

    pad_to_multiple_of: int = option(64, min=1, panel=OUTPUT)


@dataclass(frozen=True, kw_only=True)
class MergeSettings(WidthSettings, options.UploadSettings, SteeringSettings, options.FolderSettings):
    """Settings of `braces merge`.

    Attributes:
        verify: Folder of a merged checkpoint to verify again; writes nothing.
    """

    first_options = ("adapter", "output_dir", "attribute", "s", "model")

    verify: Path | None = option(None, panel=OUTPUT, flag="--check", metavar="FOLDER")

    @property
    def plain(self) -> bool:
        """Return whether a GGUF file is written as it is."""
        return self.adapter is None and is_gguf(self.model or "") and not self.attribute

    def check(self) -> None:
        """Also refuse neither or both of writing and verifying."""
        super().check()
        if self.verify is not None and (self.output_dir is not None or self.push_to_hub is not None):
            hint = "Leave out --output-dir and --push-to-hub, or --check."
            raise ConfigError("a verification writes nothing", where="--check", hint=hint)
        missing = self.adapter is None and not self.plain
        if self.verify is None and (missing or (self.output_dir is None and not self.dry_run)):
            hint = "Give both, or a merged checkpoint with --check. Without an adapter, --model takes a GGUF file."
            raise ConfigError("missing option", where="--adapter, --output-dir", hint=hint)


@command
def merge(settings: MergeSettings) -> None:
    """Write base and adapter into one plain checkpoint that transformers, vLLM or llama.cpp load without braces.

    With a GGUF file as --model, and without an adapter, this writes the checkpoint of the file.
    """
    from braces_cli.export.checkpoint import check, describe_merge, export_merge

    request, pad = _request(settings, settings.output_dir), settings.pad_to_multiple_of
    if settings.verify is not None:
        _print_result(settings, check(request, settings.verify), "the merge is verified")
        return
    write = partial(export_merge, request, pad)
    _export(settings, partial(describe_merge, request, pad), write, "merged", settings.push_to_hub)


@dataclass(frozen=True, kw_only=True)
class SlotsSettings(WidthSettings, options.ModelSettings, options.OutputSettings, options.FolderSettings):
    """Settings of `braces export slots`.

    Attributes:
        slots: Minimum number of empty neurons per layer: one for attributes, the others for ranks of adapters.
    """

    first_options = ("model", "output_dir", "slots")
    required = ("output_dir",)

    slots: int = option(64, min=2)


@command
def slots(settings: SlotsSettings) -> None:
    """Write the base with empty neurons, which LoRA files of `braces export lora` fill; logits stay as they are."""
    from braces_cli.export.run import Request
    from braces_cli.export.slots import describe_slots, export_slots

    request = Request(settings.model, None, settings, settings.output_dir, settings.overwrite)
    count, pad = settings.slots, settings.pad_to_multiple_of
    write = partial(export_slots, request, count, pad)
    _export(settings, partial(describe_slots, request, count, pad), write)


@dataclass(frozen=True, kw_only=True)
class LoraSettings(SteeringSettings, options.FolderSettings):
    """Settings of `braces export lora`.

    Attributes:
        base: Base with slots: folder written by `braces export slots`. Not with relevance to the output.
        gguf: Also write the LoRA to this GGUF file, for llama.cpp.
        combine: Write adapter and attributes at fixed strengths into one LoRA, for servers that apply one per request.
        first_slot: Number of slot ranks to skip, for other adapters that are active at the same time.
    """

    first_options = ("base", "adapter", "attribute", "s", "output_dir")
    required = ("output_dir",)

    base: Path | None = option(None)
    gguf: Path | None = option(None)
    combine: bool = option(False)
    first_slot: int = option(0, min=0, panel=OUTPUT)


@command
def lora(settings: LoraSettings) -> None:
    """Write an adapter, or with --attribute an attribute, as a plain LoRA for its base or a base with slots."""
    from braces_cli.export.lora import export_lora, plan_lora

    planned = plan_lora(_request(settings, settings.output_dir), settings.base, settings.combine, settings.first_slot)
    # The layers that an attribute steers are not known before the attribute is found or built.
    facts = {"rank": planned.rank + bool(settings.attribute if planned.slots else not planned.rank)}
    _export(settings, lambda: facts, partial(export_lora, planned, settings.gguf))


@dataclass(frozen=True, kw_only=True)
class CodeSettings(SteeringSettings, options.FolderSettings):
    """Settings of `braces export code`."""

    first_options = ("adapter", "output_dir", "attribute", "s", "model")
    required = ("adapter", "output_dir")


@command
def code(settings: CodeSettings) -> None:
    """Write base and adapter as a checkpoint with a modelling file, for bases that cannot be merged."""
    from braces_cli.export.code import export_code

    _export(settings, dict, partial(export_code, _request(settings, settings.output_dir)))


@dataclass(frozen=True, kw_only=True)
class EraseSettings(
    options.AdapterSettings, AttributeNames, options.SteeredLayers, options.OutputSettings, options.FolderSettings
):
    """Settings of `braces export erase`.

    Attributes:
        attribute: Name of an attribute to erase. Repeatable.
    """

    first_options = ("attribute", "output_dir", "adapter", "model")
    required = ("attribute", "output_dir")

    attribute: tuple[str, ...] = option((), metavar="NAME", panel=ATTRIBUTES)


@command
def erase(settings: EraseSettings) -> None:
    """Write a checkpoint whose feed-forward layers cannot write along an attribute; with an adapter the merged one."""
    from braces_cli.export.checkpoint import export_merge

    _export(settings, dict, partial(export_merge, _request(settings, settings.output_dir)))


@dataclass(frozen=True, kw_only=True)
class VectorSettings(SteeringSettings, options.OverwriteSettings):
    """Settings of `braces export control-vector`.

    Attributes:
        output: GGUF file to write.
    """

    first_options = ("attribute", "s", "adapter", "output", "model")
    required = ("output",)

    output: Path | None = option(None)


@command
def control_vector(settings: VectorSettings) -> None:
    """Write the steering of attributes as a GGUF control vector, which repeng and llama.cpp read."""
    if settings.dry_run:
        show_plan(settings)
        return
    from braces_cli.export.control_vector import write_control_vector

    _print_result(settings, write_control_vector(_request(settings, settings.output)))


for _command in (slots, lora, code, control_vector, erase):
    app.command(_command.__name__.replace("_", "-"))(_command)


def _request(settings: Any, output: Path | None) -> Any:
    """The export's Request."""
    from braces_cli.core.adapter.files import find_adapter
    from braces_cli.export.run import Request

    return Request(
        model=settings.model,
        adapter=None if settings.adapter is None else find_adapter(settings.adapter),
        options=settings,
        output=output,
        overwrite=settings.overwrite,
        attributes=getattr(settings, "strengths", {}),
        erase=settings.attribute if isinstance(settings, EraseSettings) else (),
        attributes_dir=settings.attributes,
        layers=settings.layers,
    )


def _export(
    settings: Any,
    describe: Callable[[], dict[str, Any]],
    write: Callable[..., dict[str, Any]],
    title: str = "exported",
    repository: str | None = None,
) -> None:
    """Write an export and print the result; in a dry run, print the settings and the facts that `describe` returns.

    Args:
        repository: on the hub, for the output.
    """
    from braces_cli.core.models.hub import check_push, push

    if settings.dry_run:
        try:
            facts = describe()
        except ModelError as error:
            facts = {"trainable_parameters": None, "reason": str(error)}
        show_plan(settings, facts)
        return
    if repository is not None:
        check_push(repository)
    with progress(settings.quiet) as report:
        result = write(report=report)
    if repository is not None:
        push(settings.output_dir, repository)
    _print_result(settings, result, title)


def _print_result(settings: options.OutputSettings, result: dict[str, Any], title: str = "exported") -> None:
    if settings.json:
        print_json(result)
        return
    attributes = ", ".join(f"{name} {s:+g}" for name, s in result.get("attributes", {}).items())
    shown = result | {"attributes": attributes or None}
    if "case" in result:
        shown["case"] = _CASES[result["case"]]
    if "remaining" in result:
        shown["remaining"] = f"{result['remaining'][max(result['remaining'])]:.1%}"
    if "effect_missing" in result:
        # Rounding may make it slightly negative.
        shown["effect_missing"] = f"{max(0.0, result['effect_missing']):.2%}"
    print_pairs(title, shown)
