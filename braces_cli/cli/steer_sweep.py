"""`braces steer --sweep`: every strength side by side, as a table, one JSON document and a plot."""

import sys
from importlib import resources
from pathlib import Path
from typing import Any

import typer

from braces_cli.cli import options as o
from braces_cli.cli.console import print_json, print_table, progress
from braces_cli.core.utils.errors import ConfigError

# Options that mean nothing without --sweep, by their names in `ctx.params`.
OWN = ("plot", "scorer", "score_label", "save_scorer", "judge_model", "exclude_list_words")
_COLUMNS = ("s", "score", "95 %", "perplexity", "dist-1", "dist-2", "dist-3", "rep-4", "n")
_MEASURES = ("perplexity", "distinct_1", "distinct_2", "distinct_3", "repetition", "n")


def check_unused(ctx: typer.Context) -> None:
    """Refuse a sweep's options where there is no sweep.

    Raises:
        ConfigError: one is given.
    """
    for name in OWN:
        if ctx.params[name]:
            hint = "Give --sweep FROM:TO:STEP with it."
            raise ConfigError("this belongs to --sweep", where="--" + name.replace("_", "-"), hint=hint)


def run_sweep(ctx: typer.Context) -> None:
    """Sweep the first attribute, with the others at their strength, and print what was measured.

    Raises:
        ConfigError: nothing to sweep, strengths that do not fit, or a scorer that cannot be had.
    """
    from braces_cli.core.models.generation import Sampling
    from braces_cli.core.utils.atomic_files import check_output_file, check_output_folder
    from braces_cli.scoring.registry import default_scorer
    from braces_cli.steering.sweep import SweepSettings, parse_strengths
    from braces_cli.steering.sweep_plot import plot_sweep

    p = ctx.params
    names = list(p["attribute"] or ())
    others = _others(names, p["s"] or ())
    settings = SweepSettings(parse_strengths(p["sweep"]), p["num_samples"], p["batch_size"])
    sampling = Sampling(p["max_new_tokens"], p["temperature"], p["top_p"], p["top_k"], p["seed"])
    judge = p["scorer"] or default_scorer(names[0])
    if p["plot"] is not None:
        check_output_file(p["plot"], p["overwrite"])
    if p["save_scorer"] is not None:
        check_output_folder(p["save_scorer"], p["overwrite"])
    prompts = _prompts(p["prompt"], p["prompts"])
    with progress(p["quiet"]) as report:
        document = _measure(ctx, names[0], others, judge, prompts, sampling, settings, report)
    if p["plot"] is not None:
        plot_sweep(document, p["plot"])
    if p["fmt"] is o.Format.json or (p["fmt"] is None and not sys.stdout.isatty()):
        print_json(document)
    else:
        _print(document)


def _others(names: list[str], s: Any) -> dict[str, float]:
    """Attributes behind the first, and their strengths."""
    if not names:
        raise ConfigError("nothing to sweep", where="--attribute", hint="Such as --attribute positive --sweep -4:4:1.")
    if len(set(names)) < len(names):
        raise ConfigError("an attribute is named twice", where="--attribute", hint="Give each once.")
    if len(s) not in (0, len(names) - 1):
        hint = "The first attribute is swept; give one --s for each of the others, or none at all."
        raise ConfigError(f"{len(s)} strengths for {len(names) - 1} other attributes", where="--s", hint=hint)
    return dict(zip(names[1:], list(s) or [1.0] * (len(names) - 1), strict=True))


def _prompts(given: list[str] | None, file: Path | None) -> list[str]:
    """The user's prompts, else those that come with braces; a sweep reads no standard input."""
    from braces_cli.steering.prompts import read_prompts

    if given or file is not None:
        return list(read_prompts(given or (), file, sys.stdin))
    text = (resources.files("braces_cli.assets") / "prompts" / "neutral.txt").read_text(encoding="utf-8")
    return text.splitlines()


def _measure(
    ctx: typer.Context,
    name: str,
    others: dict[str, float],
    judge_name: str,
    prompts: list[str],
    sampling: Any,
    settings: Any,
    report: Any,
) -> dict[str, Any]:
    from dataclasses import replace

    from braces_cli.core.attributes.attribute import check_name, find_attribute
    from braces_cli.core.models.layer_ranges import chosen_layers
    from braces_cli.core.models.loading import load_base
    from braces_cli.core.session import open_session
    from braces_cli.scoring.registry import label_of
    from braces_cli.steering.scorer_loading import list_words, open_scorer
    from braces_cli.steering.sweep import sweep

    p = ctx.params
    for each in (name, *others):
        check_name(each)
    folder = p["attributes"]
    if folder is not None and not folder.is_dir():
        raise ConfigError("no such folder", where=str(folder), hint="Give the folder that attr-build wrote.")
    save, words = p["save_scorer"], p["exclude_list_words"]
    # Without words to leave out the scorer needs no model: what is wrong with it should show before one is loaded.
    judge = None if words else open_scorer(judge_name, save=save)
    if judge is not None:
        label_of(name, judge, p["score_label"])
    session = open_session(p["model"], p["adapter"], o.load_options(ctx))
    swept = find_attribute(session, name, folder, report)
    rest = [(find_attribute(session, other, folder, report), s) for other, s in others.items()]
    left_out = list_words(session, [swept, *(other for other, _ in rest)]) if words else set()
    judge = judge or open_scorer(judge_name, exclude=left_out, save=save)
    label = label_of(name, judge, p["score_label"])
    judge_model = load_base(p["judge_model"], replace(o.load_options(ctx), revision=None)) if p["judge_model"] else None
    settings = replace(settings, layers=chosen_layers(session.base.model, p["layers"]))
    found = sweep(
        session, swept, prompts, judge, label, sampling, settings, others=rest, judge_model=judge_model, report=report
    )
    return {
        "attribute": name,
        "model": session.base.name,
        "adapter": p["adapter"],
        "other_attributes": others,
        "scorer": judge_name,
        "label": label,
        "excluded_words": sorted(left_out),
        "judge_model": p["judge_model"],
        "prompts": len(prompts),
        "samples": settings.samples,
        "seed": sampling.seed,
        **found,
    }


def _print(document: dict[str, Any]) -> None:
    title = f"{document['attribute']} on {document['model']}; score: share {document['label']} by {document['scorer']}"
    print_table(title, _COLUMNS, [_row(point) for point in document["points"]])
    chosen = document["chosen"]
    if chosen is None:
        return
    title = "the best strength by half of the prompts, measured on the other half"
    print_table(title, _COLUMNS, [_row(chosen["unsteered_on_other_half"]), _row(chosen["on_other_half"])])


def _row(point: dict[str, Any]) -> list[Any]:
    low, high = point["attribute_score_interval"]
    return [point["s"], point["attribute_score"], f"{low:.2f}-{high:.2f}", *(point[name] for name in _MEASURES)]
