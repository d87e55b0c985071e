"""`braces steer`: generate text, with or without an adapter, pushed along attributes."""

import sys
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from braces_cli.cli import options as o
from braces_cli.cli.render import print_json, print_json_lines, print_table, progress, set_up
from braces_cli.cli.steer_sweep import check_unused, run_sweep
from braces_cli.core.errors import ConfigError

if TYPE_CHECKING:
    from braces_cli.core.push import Push


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
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Texts at a time.")] = 8,
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
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an output that is there.")] = False,
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
    names, strengths = list(attribute or ()), _strengths(attribute or (), s or ())
    if dry_run:
        print_json({"settings": o.resolved(ctx)})
        return

    from braces_cli.core.attributes import check_name
    from braces_cli.core.generate import Sampling
    from braces_cli.steering.prompts import read_prompts

    sampling = Sampling(max_new_tokens, temperature, top_p, top_k, seed)
    for name in names:
        check_name(name)
    if attributes is not None and not attributes.is_dir():
        raise ConfigError("no such folder", where=str(attributes), hint="Give the folder that attr-build wrote.")
    texts = read_prompts(prompt or (), prompts, sys.stdin)
    # The first prompt before the model: what is wrong with the source should show before minutes of loading.
    texts = chain([next(texts)], texts)
    asked = dict(zip(names, strengths, strict=True))
    if fmt is None:
        fmt = o.Format.table if sys.stdout.isatty() else o.Format.json
    with progress(quiet) as report:
        rows = _rows(ctx, asked, attributes, texts, sampling, report)
        if fmt is o.Format.json:
            print_json_lines(rows)
            return
        found = list(rows)
    print_table("", ["prompt", "text"], [(row["prompt"], row["text"]) for row in found])


def _strengths(names: Any, s: Any) -> list[float]:
    if len(set(names)) < len(names):
        raise ConfigError("an attribute is named twice", where="--attribute", hint="Give each once, with one --s.")
    if len(s) not in (0, len(names)):
        hint = "The k-th --s belongs to the k-th --attribute; give one for each, or none at all."
        raise ConfigError(f"{len(s)} strengths for {len(names)} attributes", where="--s", hint=hint)
    for value in s:
        if not abs(value) < float("inf"):
            raise ConfigError(f"{value} is no finite number", where="--s", hint="Such as --s 3.0 or --s -1.5.")
    return list(s) or [1.0] * len(names)


def _rows(
    ctx: typer.Context, asked: dict[str, float], folder: Path | None, texts: Any, sampling: Any, report: Any
) -> Any:
    from braces_cli.core.attributes import find_attribute
    from braces_cli.core.ffn import chosen_layers
    from braces_cli.core.push import steered
    from braces_cli.core.session import open_session
    from braces_cli.steering.run import steer_texts

    params = ctx.params
    session = open_session(params["model"], params["adapter"], o.load_options(ctx))
    terms = [(find_attribute(session, name, folder, report), value) for name, value in asked.items()]
    layers = chosen_layers(session.base.model, params["layers"])
    with steered(session, terms, layers) as pushes:
        _note(asked, pushes)
        sizes = {"samples": params["num_samples"], "batch_size": params["batch_size"]}
        yield from steer_texts(session, texts, asked, sampling, **sizes, report=report)


def _note(asked: dict[str, float], pushes: "list[Push]") -> None:
    """One line on stderr, so that nobody wonders why nothing happens."""
    import logging

    if not asked:
        return
    what = ", ".join(f"{name} {value:+g}" for name, value in asked.items())
    strongest = max(pushes, key=lambda push: push.share, default=None)
    if strongest is None:
        note = "nothing is added, the text is that of the unsteered model"
    else:
        note = f"the added vector is {strongest.share:.1%} of the residual stream at most (layer {strongest.layer})"
    logging.getLogger("braces").info("%s: %s", what, note)
