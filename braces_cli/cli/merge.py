"""`braces merge`: base + adapter -> a checkpoint that needs no braces."""

from pathlib import Path
from typing import Annotated, Any

import typer

from braces_cli.cli import options as o
from braces_cli.cli.console import print_json, print_pairs, progress, set_up
from braces_cli.core.utils.errors import ConfigError, ModelError


def merge(
    ctx: typer.Context,
    model: o.Model = None,
    adapter: o.AdapterName = None,
    output_dir: Annotated[Path | None, typer.Option("--output-dir", help="Folder of the merged checkpoint.")] = None,
    attribute: Annotated[
        list[str] | None, typer.Option("--attribute", help="Attribute to merge in as a constant. Repeatable.")
    ] = None,
    s: Annotated[
        list[float] | None, typer.Option("--s", help="Strength; the k-th belongs to the k-th --attribute. Default 1.")
    ] = None,
    attributes: Annotated[Path | None, typer.Option("--attributes", help="Folder that attr-build wrote.")] = None,
    layers: o.Layers = None,
    pad_to_multiple_of: Annotated[
        int,
        typer.Option("--pad-to-multiple-of", min=1, help="Of the FFN's width. 256 for llama.cpp's K-quants."),
    ] = 64,
    check: Annotated[
        Path | None, typer.Option("--check", help="Prove this merged folder once more; writes nothing.")
    ] = None,
    overwrite: o.Overwrite = False,
    revision: o.Revision = None,
    device: o.Device = "auto",
    dtype: o.DtypeOption = o.Dtype.auto,
    device_map: o.DeviceMap = None,
    quantize: o.Quantize = None,
    trust_remote_code: o.TrustRemoteCode = False,
    seed: o.Seed = 0,
    config: o.Config = None,
    dry_run: o.DryRun = False,
    fmt: o.FormatOption = o.Format.table,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Write base and adapter into one plain checkpoint that transformers, vLLM or llama.cpp load without braces."""
    set_up(quiet, debug)
    strengths = o.strengths(attribute or (), s or ())
    asked = dict(zip(attribute or (), strengths, strict=True))
    if dry_run:
        print_json({"settings": o.resolved(ctx), **_planned(ctx, asked)})
        return
    if (output_dir is None) == (check is None):
        what = "missing option" if check is None else "either writes or checks"
        raise ConfigError(what, where="--output-dir, --check", hint="Give one of the two.")

    from braces_cli.export import merge as core

    with progress(quiet) as report:
        if check is not None:
            result = core.check(_request(ctx, asked, core.read_record(check)), check)
        else:
            assert output_dir is not None
            result = core.merge(_request(ctx, asked), output_dir, overwrite, report)
    if fmt is o.Format.json:
        print_json(result)
        return
    shown = {**result, "attributes": ", ".join(f"{name} {s:+g}" for name, s in asked.items()) or None}
    print_pairs("merge holds" if check is not None else "merged", shown)


def _request(ctx: typer.Context, asked: dict[str, float], record: dict[str, Any] | None = None) -> Any:
    """The request of this call; where it checks a folder, what is not given is what the folder says."""
    from dataclasses import replace

    from braces_cli.core.method.adapter_files import find_adapter
    from braces_cli.export.merge import Request

    params, options, record = ctx.params, o.load_options(ctx), record or {}
    adapter = params["adapter"] or record.get("adapter")
    if adapter is None:
        raise ConfigError("missing option", where="--adapter", hint="Name the adapter that is to be merged.")
    if record and options.dtype == "auto":
        options = replace(options, dtype=record.get("dtype", "auto"))
    return Request(
        model=params["model"] or record.get("model"),
        adapter=find_adapter(adapter),
        options=options,
        attributes=asked or record.get("attributes", {}),
        attributes_dir=params["attributes"],
        layers=params["layers"] or record.get("layers"),
        multiple=params["pad_to_multiple_of"],
    )


def _planned(ctx: typer.Context, asked: dict[str, float]) -> dict[str, Any]:
    """What would be written, or why that cannot be said."""
    if ctx.params["adapter"] is None:
        return {"trainable_parameters": None, "reason": "no adapter given"}
    from braces_cli.export.merge import describe

    try:
        return describe(_request(ctx, asked))
    except ModelError as error:
        return {"trainable_parameters": None, "reason": str(error)}
