"""`braces steer`: generate text, with or without an adapter, pushed along attributes."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from braces_cli.cli import options as o
from braces_cli.cli.console import print_json, set_up
from braces_cli.cli.steer_sweep import check_unused, run_sweep
from braces_cli.core.utils.errors import ConfigError


def steer(
    ctx: typer.Context,
    attribute: Annotated[
        list[str] | None,
        typer.Option("--attribute", help="Attribute to steer by: built, trained or built-in. Repeatable."),
    ] = None,
    s: Annotated[
        list[float] | None, typer.Option("--s", help="Strength; the k-th belongs to the k-th --attribute. Default 1.")
    ] = None,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", help="Repeatable. Default: standard input.")] = None,
    prompts: Annotated[Path | None, typer.Option("--prompts", help="One a line, or JSON Lines with `prompt`.")] = None,
    model: o.Model = None,
    adapter: o.AdapterName = None,
    attributes: Annotated[Path | None, typer.Option("--attributes", help="Folder that attr-build wrote.")] = None,
    layers: o.Layers = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1)] = 50,
    temperature: Annotated[float, typer.Option("--temperature", help="0 is greedy.")] = 1.0,
    top_p: Annotated[float, typer.Option("--top-p")] = 0.9,
    top_k: Annotated[int | None, typer.Option("--top-k", help="Default: all tokens.")] = None,
    num_samples: Annotated[int, typer.Option("--num-samples", min=1, help="Texts for each prompt.")] = 1,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", help="A text ends before this one, such as a full stop. Repeatable.")
    ] = None,
    apply_chat_template: Annotated[
        bool | None,
        typer.Option(
            "--apply-chat-template/--no-apply-chat-template",
            help="Prompts as a user's turn. Default: as the adapter was trained.",
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Texts at a time.")] = 8,
    export_control_vector: Annotated[
        Path | None,
        typer.Option(
            "--export-control-vector", hidden=True, help="Use braces export control-vector; this is its older name."
        ),
    ] = None,
    sweep: Annotated[
        str | None,
        typer.Option(
            "--sweep", metavar="FROM:TO:STEP", help="Measure the first attribute at every strength, as -4:4:1."
        ),
    ] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw the sweep into this PNG file.")] = None,
    scorer: Annotated[
        str | None,
        typer.Option("--scorer", help="Of a sweep: vader, toxicity, fit:ROWS, or a classifier's folder or hub id."),
    ] = None,
    score_label: Annotated[
        str | None, typer.Option("--score-label", help="The scorer's label for the attribute, if not its own name.")
    ] = None,
    save_scorer: Annotated[Path | None, typer.Option("--save-scorer", help="Keep what fit:ROWS fitted there.")] = None,
    judge_model: Annotated[
        str | None, typer.Option("--judge-model", help="Tells perplexity in place of the base: folder or hub id.")
    ] = None,
    exclude_list_words: Annotated[
        bool, typer.Option("--exclude-list-words", help="The scorer does not look at the attributes' own words.")
    ] = False,
    beside: Annotated[bool, typer.Option("--beside", help="The unsteered text beside the steered one.")] = False,
    interactive: Annotated[
        bool, typer.Option("--interactive", help="Prompts and commands (/s 2, /attribute NAME, /help) line by line.")
    ] = False,
    output: Annotated[Path | None, typer.Option("--output", help="Write the texts into this JSON Lines file.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue --output behind its last complete line.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output file if it is there.")] = False,
    seed: o.Seed = 0,
    revision: o.Revision = None,
    device: o.Device = "auto",
    dtype: o.DtypeOption = o.Dtype.auto,
    device_map: o.DeviceMap = None,
    quantize: o.Quantize = None,
    trust_remote_code: o.TrustRemoteCode = False,
    config: o.Config = None,
    dry_run: o.DryRun = False,
    fmt: Annotated[
        o.Format | None, typer.Option("--format", help="json is JSON Lines, the default where stdout is no terminal.")
    ] = None,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Generate text from prompts, steered along attributes by strength s (negative: away from them)."""
    set_up(quiet, debug)
    if sweep is not None and not dry_run:
        run_sweep(ctx)
        return
    if sweep is None:
        check_unused(ctx)
    names, strengths = list(attribute or ()), o.strengths(attribute or (), s or ())
    if dry_run:
        print_json({"settings": o.resolved(ctx)})
        return

    from braces_cli.core.attributes.word_lists import check_name

    for name in names:
        check_name(name)
    if attributes is not None and not attributes.is_dir():
        raise ConfigError("no such folder", where=str(attributes), hint="Give the folder that attr-build wrote.")
    asked = dict(zip(names, strengths, strict=True))
    if export_control_vector is not None:
        _export(ctx, asked, attributes, export_control_vector)
        return
    if fmt is None:
        fmt = o.Format.table if sys.stdout.isatty() else o.Format.json
    if interactive:
        from braces_cli.cli.steer_interactive import converse

        converse(ctx, asked, fmt)
        return
    from braces_cli.cli.steer_texts import generate_texts

    generate_texts(ctx, asked, fmt)


def _export(ctx: typer.Context, asked: dict[str, float], folder: Path | None, path: Path) -> None:
    from braces_cli.core.attributes.attribute import find_attribute
    from braces_cli.core.models.ffn import chosen_layers
    from braces_cli.core.session import open_session
    from braces_cli.export.control_vector import check_export, export_control_vector

    check_export(path, ctx.params["overwrite"])
    session = open_session(ctx.params["model"], ctx.params["adapter"], o.load_options(ctx))
    terms = [(find_attribute(session, name, folder), value) for name, value in asked.items()]
    layers = chosen_layers(session.base.model, ctx.params["layers"])
    print_json({**export_control_vector(session, terms, layers, path), "attributes": asked})
