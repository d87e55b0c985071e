"""`braces steer --sweep`: every strength side by side, as a table, one JSON document and a plot."""

from __future__ import annotations

import sys
from importlib import resources
from typing import Any

from braces_cli.cli.output import print_json, print_table, progress
from braces_cli.cli.steer_settings import SteerSettings
from braces_cli.core.distributed import is_main, join_all
from braces_cli.core.errors import DataError

_COLUMNS = ("s", "score", "95 %", "perplexity", "dist-1", "dist-2", "dist-3", "rep-4", "n")
_MEASURES = ("perplexity", "distinct_1", "distinct_2", "distinct_3", "repetition", "n")


def run_sweep(settings: SteerSettings) -> None:
    """Sweep the first attribute, with the others at their strength, and print what was measured.

    Raises:
        ConfigError: nothing to sweep, strengths that do not fit, or a scorer that cannot be had.
    """
    from braces_cli.core.attributes.options import parse_strengths
    from braces_cli.core.files import check_output_file
    from braces_cli.evaluation.tables import plot_sweep
    from braces_cli.scoring.registry import default_scorer

    assert settings.sweep is not None
    strengths, scorer = parse_strengths(settings.sweep), settings.scorer or default_scorer(settings.attribute[0])
    # One process looks: by the time that another one does, the first may be writing.
    if settings.plot is not None and is_main():
        check_output_file(settings.plot, settings.overwrite)
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
    """Load everything, sweep, and return the document."""
    from dataclasses import replace

    from braces_cli.core.adapter.model import open_session
    from braces_cli.core.attributes.hooks import steered
    from braces_cli.core.attributes.lookup import find_attribute
    from braces_cli.core.models.load import input_device, load_base
    from braces_cli.core.models.options import chosen_layers
    from braces_cli.evaluation.baselines import baseline_methods
    from braces_cli.evaluation.native_tasks import detection, read_answer_pairs, read_labelled
    from braces_cli.evaluation.sweep import BRACES_METHOD, Method, sweep
    from braces_cli.evaluation.systems import bare
    from braces_cli.evaluation.text_tasks import TextMeasurement, list_words, load_scorer
    from braces_cli.scoring.registry import label_of
    from braces_cli.steering.texts import uses_chat_template

    name, options = settings.attribute[0], settings
    # Without words to exclude the scorer needs no model, so its errors come before one is loaded.
    loaded = None if settings.exclude_list_words else load_scorer(scorer)
    if loaded is not None:
        label_of(name, loaded, settings.score_label)
    answers = read_answer_pairs(settings.answers) if settings.answers else []
    labelled = read_labelled(settings.detect) if settings.detect else []
    session = open_session(settings.model, settings.adapter, options)
    reference_model = None
    if settings.reference_model is not None:
        reference_model = load_base(settings.reference_model, replace(options, revision=None))
    chat = uses_chat_template(session, settings.apply_chat_template)
    processes = join_all(input_device(session.base.model))
    swept = find_attribute(session, name, settings.attributes, report)
    others = [(find_attribute(session, each, settings.attributes, report), s) for each, s in settings.strengths.items()]
    excluded: set[str] = set()
    if loaded is None:
        excluded = list_words(session, [swept, *(attribute for attribute, _ in others)])
        loaded = load_scorer(scorer, excluded)
    label = label_of(name, loaded, settings.score_label)
    detected: dict[str, Any] = {}
    if settings.detect:
        with bare(session):
            wanted = settings.score_label or name
            detected["detection"] = detection(session, swept, labelled, wanted, settings.detect, report)
    layers = chosen_layers(session.base.model, settings.layers)
    ours = Method(BRACES_METHOD, strengths, lambda s: steered(session, [(swept, s), *others], layers))
    baselines = baseline_methods(session, settings.baseline_names, swept, strengths, layers, report)
    measurement = TextMeasurement(
        session, loaded, {name: label}, settings.sampling, settings.num_samples, settings.batch_size, chat,
        reference_model, processes, report,
    )  # fmt: skip
    return {
        "attribute": name,
        "model": session.base.name,
        "adapter": settings.adapter,
        "other_attributes": settings.strengths,
        "reference_model": settings.reference_model,
        "prompts": len(prompts),
        "samples": settings.num_samples,
        "seed": settings.seed,
        "stop": list(settings.stop),
        "scorer": scorer,
        "label": label,
        "excluded_words": sorted(excluded),
        "apply_chat_template": chat,
        **sweep(measurement, prompts, ours, baselines, answers),
        **detected,
    }


def _print(document: dict[str, Any]) -> None:
    title = f"{document['attribute']} on {document['model']}; score: share {document['label']} by {document['scorer']}"
    print_table(title, _COLUMNS, [_row(point) for point in document["points"]])
    _print_effects(document)
    if document.get("answers"):
        columns = ("s", "P(positive)", "preferred", "shift", "95 %", "wrong way", "95 % ", "n")
        names = ("s", "probability", "prefers_positive", "shift", *("shift_interval", "wrong_way"))
        rows = [
            [*(_cell(each[name]) for name in (*names, "wrong_way_interval")), each["n"]] for each in document["answers"]
        ]
        print_table("preference between two answers; shift: of the log odds against s = 0", columns, rows)
    if document.get("detection"):
        found = document["detection"]
        row = [found["layer"], found["auroc"], _cell(found["auroc_interval"]), found["n"]]
        print_table("detection, layer chosen on the other half", ("layer", "AUROC", "95 %", "n"), [row])
    if document.get("baselines"):
        _print_baselines(document)
    chosen = document["chosen"]
    if chosen is None:
        return
    title = "the best strength by half of the prompts, measured on the other half"
    print_table(title, _COLUMNS, [_row(chosen["unsteered_on_other_half"]), _row(chosen["on_other_half"])])


def _print_effects(document: dict[str, Any]) -> None:
    """The effect on single prompts at each strength, and what a judge model or several samples add to that."""
    more = ["expected_maximum", "at_least_one"] if document["samples"] > 1 else []
    more += [name for name in ("concept", "relevance", "fluency", "overall") if name in document["points"][0]]
    names = ["s", "effect", "effect_interval", "wrong_way", "wrong_way_interval", *more]
    columns = ["s", "effect", "95 %", "wrong way", "95 % ", *(name.replace("_", " ") for name in more)]
    slope = document["slope"]
    title = f"effect on a prompt's value by {document['scorer']}, and share of prompts that move the wrong way (Wilson)"
    if slope is not None:
        title += f"; slope {slope['slope']:.3g} per s (95 %: {_cell(slope['slope_interval'])})"
    print_table(title, columns, [[_cell(point[name]) for name in names] for point in document["points"]])


def _print_baselines(document: dict[str, Any]) -> None:
    rows = [
        [each["method"], *_row(point), _cell(point["wrong_way"]), _cell(point["wrong_way_interval"])]
        for each in document["baselines"]
        for point in each["points"]
    ]
    columns = ("method", *_COLUMNS, "wrong way", "95 % ")
    print_table("other ways to steer, on the same prompts", columns, rows)
    rows = [
        [f"{row['ratio']:g} times", "s > 0" if row["side"] > 0 else "s < 0", row["method"], row["attribute_score"],
         "" if row["reached"] else f"costs less, up to s = {row['s']:g}"]
        for row in document["at_equal_perplexity"]
    ]  # fmt: skip
    equal = ("perplexity", "side", "method", "score", "")
    print_table("at equal perplexity", equal, rows)


def _cell(value: Any) -> Any:
    """A number, or an interval as text."""
    return f"{value[0]:.3g} to {value[1]:.3g}" if isinstance(value, list) else value


def _row(point: dict[str, Any]) -> list[Any]:
    low, high = point["attribute_score_interval"]
    return [point["s"], point["attribute_score"], f"{low:.2f}-{high:.2f}", *(point[name] for name in _MEASURES)]
