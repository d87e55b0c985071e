"""`braces merge`: base + adapter -> a checkpoint that needs no braces."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from braces_cli.cli.options import command, show_plan
from braces_cli.cli.output import print_json, print_pairs, progress
from braces_cli.core.attributes.options import AttributeSettings
from braces_cli.core.config import OUTPUT, option
from braces_cli.core.errors import ConfigError, ModelError
from braces_cli.core.options import AdapterSettings, FolderSettings, OutputSettings, SteeredLayers, UploadSettings


@dataclass(frozen=True, kw_only=True)
class MergeSettings(AdapterSettings, AttributeSettings, SteeredLayers, FolderSettings, UploadSettings, OutputSettings):
    """Settings of `braces merge`."""

    first_options = ("adapter", "output_dir", "attribute", "s", "model")

    pad_to_multiple_of: int = option(
        64,
        help="Round the width of the FFN up to a multiple of this; 256 for llama.cpp's K-quants.",
        min=1,
        panel=OUTPUT,
    )
    verify: Path | None = option(
        None,
        help="Folder of a merged checkpoint to verify again; writes nothing.",
        panel=OUTPUT,
        flag="--check",
        metavar="FOLDER",
    )

    def check(self) -> None:
        """Also refuses neither or both of writing and verifying."""
        super().check()
        if not self.dry_run and (self.output_dir is None) == (self.verify is None):
            what = "missing option" if self.verify is None else "either writes or checks"
            raise ConfigError(what, where="--output-dir, --check", hint="Give one of the two.")
        if self.push_to_hub is not None and self.verify is not None:
            hint = "Leave out --push-to-hub, or merge into --output-dir."
            raise ConfigError("a check uploads nothing", where="--push-to-hub", hint=hint)


# What the table calls the fields of a result, of an export, too.
LABELS = {
    "case": "written as",
    "max_logit_difference": "largest difference of a logit from base and adapter",
    "relative_difference": "the same over the largest logit",
    "rounding": "rounding error of the base's logits",
    "adapter_effect": "largest change of a logit by the adapter",
    "effect_missing": "share of the adapter's change that is lost",
    "probes": "probe prompts",
}
_KINDS = {
    "a": "more neurons in the gated FFN",
    "b": "a Llama with more neurons in its FFN",
    "c": "pairs of neurons in the FFN without gate",
}


@command
def merge(settings: MergeSettings) -> None:
    """Write base and adapter into one plain checkpoint that transformers, vLLM or llama.cpp load without braces."""
    if settings.dry_run:
        show_plan(settings, _planned(settings))
        return
    from braces_cli.core.models.hub import check_push, push
    from braces_cli.export import merge as core

    if settings.push_to_hub is not None:
        check_push(settings.push_to_hub)
    with progress(settings.quiet) as report:
        if settings.verify is not None:
            result = core.check(_request(settings, core.read_record(settings.verify)), settings.verify)
        else:
            assert settings.output_dir is not None
            result = core.merge(_request(settings), settings.output_dir, settings.overwrite, report)
    if settings.push_to_hub is not None and settings.output_dir is not None:
        push(settings.output_dir, settings.push_to_hub)
    if settings.json:
        print_json(result)
        return
    title = "the merge is verified" if settings.verify is not None else "merged"
    print_pairs(title, readable(result), LABELS)


def readable(result: dict[str, Any]) -> dict[str, Any]:
    """A result of `braces merge` or `braces export` with its values in words."""
    shown = ", ".join(f"{name} {s:+g}" for name, s in result.get("attributes", {}).items()) or None
    kind = _KINDS.get(result.get("case", ""))
    # Rounding may leave a little less than nothing.
    lost = {name: f"{max(0.0, result[name]):.2%}" for name in ("effect_missing",) if name in result}
    return {**result, "attributes": shown, **({"case": kind} if kind else {}), **lost}


def _request(settings: MergeSettings, record: dict[str, Any] | None = None) -> Any:
    """The request of this call; where it checks a folder, what is not given is what the folder says."""
    from dataclasses import replace

    from braces_cli.core.adapter.files import find_adapter
    from braces_cli.export.request import Request

    options, record = settings, record or {}
    adapter = settings.adapter or record.get("adapter")
    if adapter is None and settings.verify is not None:
        hint = "braces merge leaves a record in each folder that it writes; give such a folder, or --adapter, too."
        raise ModelError("no checkpoint that braces merge wrote", where=str(settings.verify), hint=hint)
    if adapter is None:
        raise ConfigError("missing option", where="--adapter", hint="Name the adapter that is to be merged.")
    attributes_dir = settings.attributes
    if attributes_dir is None and not settings.attribute and record.get("attributes_dir"):
        attributes_dir = Path(record["attributes_dir"])
    if record and options.dtype == "auto":
        options = replace(options, dtype=record.get("dtype", "auto"))
    return Request(
        model=settings.model or record.get("model"),
        adapter=find_adapter(adapter),
        options=options,
        attributes=settings.strengths or record.get("attributes", {}),
        attributes_dir=attributes_dir,
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
