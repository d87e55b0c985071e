"""`braces steer --sweep`: every strength side by side, as a table, one JSON document and a plot."""

from __future__ import annotations

import sys
from importlib import resources
from typing import Any

from braces_cli.cli.console import print_json, print_table, progress
from braces_cli.cli.steer_options import SteerSettings
from braces_cli.core.utils.distributed import is_main, join_all
from braces_cli.core.utils.errors import DataError

_COLUMNS = ("s", "score", "95 %", "perplexity", "dist-1", "dist-2", "dist-3", "rep-4", "n")
_MEASURES = ("perplexity", "distinct_1", "distinct_2", "distinct_3", "repetition", "n")


def run_sweep(settings: SteerSettings) -> None:
    """Sweep the first attribute, with the others at their strength, and print what was measured.

    Raises:
        ConfigError: nothing to sweep, strengths that do not fit, or a scorer that cannot be had.
    """
    from braces_cli.core.attributes.attribute_options import parse_strengths
    from braces_cli.core.utils.atomic_files import check_output_file, check_output_folder
    from braces_cli.scoring.registry import default_scorer
    from braces_cli.steering.sweep_plot import plot_sweep

    assert settings.sweep is not None
    strengths, scorer = parse_strengths(settings.sweep), settings.scorer or default_scorer(settings.attribute[0])
    # One process looks: by the time that another one does, the first may be writing.
    if settings.plot is not None and is_main():
        check_output_file(settings.plot, settings.overwrite)
    if settings.save_scorer is not None and is_main():
        check_output_folder(settings.save_scorer, settings.overwrite)
    prompts = _prompts(settings)
    with progress(settings.quiet or not is_main()) as report:
        document = _measure(settings, strengths, scorer, prompts, report)
    if not is_main():
        return
    if settings.plot is not None:
        plot_sweep(document, settings.plot)
    if settings.json:
        print_json(document)
    else:
        _print(document)


def _prompts(settings: SteerSettings) -> list[str]:
    """The user's prompts, else those that come with braces; a sweep reads no standard input.

    Raises:
        DataError: a row with attributes of its own.
    """
    from braces_cli.steering.prompts import read_prompt_rows

    if settings.prompt or settings.prompts is not None:
        rows = list(read_prompt_rows(settings.prompt, settings.prompts, sys.stdin))
        if any(row.attributes is not None for row in rows):
            hint = "A sweep steers all prompts alike; remove `attributes` from the rows."
            raise DataError("a row has attributes of its own", where=str(settings.prompts), hint=hint)
        return [row.text for row in rows]
    text = (resources.files("braces_cli.assets") / "prompts" / "neutral.txt").read_text(encoding="utf-8")
    return text.splitlines()


def _measure(
    settings: SteerSettings, strengths: list[float], scorer: str, prompts: list[str], report: Any
) -> dict[str, Any]:
    from dataclasses import replace

    from braces_cli.core.attributes.attribute import find_attribute
    from braces_cli.core.models.layer_ranges import chosen_layers
    from braces_cli.core.models.loading import input_device, load_base
    from braces_cli.core.session import open_session
    from braces_cli.scoring.registry import label_of
    from braces_cli.steering.chat_prompts import chat_wanted
    from braces_cli.steering.scorer_loading import list_words, open_scorer
    from braces_cli.steering.sweep import SweepPlan, sweep

    name, sampling, options = settings.attribute[0], settings.sampling, settings.load_options
    save = settings.save_scorer if is_main() else None
    # Without words to leave out the scorer needs no model: what is wrong with it should show before one is loaded.
    judge = None if settings.exclude_list_words else open_scorer(scorer, save=save)
    if judge is not None:
        label_of(name, judge, settings.score_label)
    session = open_session(settings.model, settings.adapter, options)
    plan = SweepPlan(
        strengths,
        settings.num_samples,
        settings.batch_size,
        layers=chosen_layers(session.base.model, settings.layers),
        chat=chat_wanted(session, settings.apply_chat_template),
        processes=join_all(input_device(session.base.model)),
    )
    swept = find_attribute(session, name, settings.attributes, report)
    others = [(find_attribute(session, each, settings.attributes, report), s) for each, s in settings.strengths.items()]
    excluded: set[str] = set()
    if judge is None:
        excluded = list_words(session, [swept, *(attribute for attribute, _ in others)])
        judge = open_scorer(scorer, exclude=excluded, save=save)
    label = label_of(name, judge, settings.score_label)
    judge_model = load_base(settings.judge_model, replace(options, revision=None)) if settings.judge_model else None
    measured = sweep(
        session, swept, prompts, judge, label, sampling, plan, others=others, judge_model=judge_model, report=report
    )
    return {
        "attribute": name,
        "model": session.base.name,
        "adapter": settings.adapter,
        "other_attributes": settings.strengths,
        "scorer": scorer,
        "label": label,
        "excluded_words": sorted(excluded),
        "judge_model": settings.judge_model,
        "prompts": len(prompts),
        "samples": settings.num_samples,
        "seed": settings.seed,
        "stop": list(settings.stop),
        "apply_chat_template": plan.chat,
        **measured,
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
