"""`braces steer --sweep`: measure several strengths, and show them as tables, one JSON document and a plot."""

import json
import sys
from contextlib import AbstractContextManager
from dataclasses import replace
from importlib import resources
from typing import Any

from braces_cli.cli.output import print_json, print_table, progress
from braces_cli.core.adapter.model import open_session
from braces_cli.core.attributes.hooks import erased_directions, steered
from braces_cli.core.attributes.lookup import find_attribute
from braces_cli.core.attributes.options import parse_strengths
from braces_cli.core.distributed import is_main, join
from braces_cli.core.errors import DataError
from braces_cli.core.files import check_output_file, write_text
from braces_cli.core.models.ffn import chosen_layers
from braces_cli.core.models.load import input_device, load_base
from braces_cli.core.progress import Report
from braces_cli.evaluation.native_tasks import detection, read_answer_pairs, read_labelled
from braces_cli.evaluation.sweep import BRACES_METHOD, Method, baseline_methods, sweep
from braces_cli.evaluation.systems import bare
from braces_cli.evaluation.tables import plot_sweep, sweep_tables
from braces_cli.evaluation.text_tasks import TextMeasurement, list_words, load_scorer
from braces_cli.scoring.scorers import default_scorer, label_of
from braces_cli.steering.prompts import read_prompt_rows
from braces_cli.steering.settings import SteerSettings
from braces_cli.steering.texts import uses_chat_template


def run_sweep(settings: SteerSettings) -> None:
    """Sweep the first attribute, with the others at a fixed strength, and print the measurements."""
    # Only the first process checks: by the time another one does, the first can have started to write.
    for file in (settings.plot, settings.output):
        if file is not None and is_main():
            check_output_file(file, settings.overwrite)
    if settings.prompt or settings.prompts is not None:
        rows = list(read_prompt_rows(settings.prompt, settings.prompts, sys.stdin))
        if any(row.attributes is not None for row in rows):
            hint = "A sweep steers all prompts alike; remove `attributes` from the rows."
            raise DataError("a row has `attributes`", where=str(settings.prompts), hint=hint)
        prompts = [row.text for row in rows]
    else:
        neutral = resources.files("braces_cli.assets") / "prompts" / "neutral.txt"
        prompts = neutral.read_text(encoding="utf-8").splitlines()
    with progress(settings.quiet or not is_main()) as report:
        texts: list[dict[str, Any]] = []
        document = _measure(settings, prompts, report, texts)
    if not is_main():
        return
    if settings.output is not None:
        write_text(settings.output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in texts))
    if settings.plot is not None:
        plot_sweep(document, settings.plot)
    if settings.json:
        print_json(document)
    else:
        for title, columns, cells in sweep_tables(document):
            print_table(title, columns, cells)


def _measure(
    settings: SteerSettings, prompts: list[str], report: Report, texts: list[dict[str, Any]]
) -> dict[str, Any]:
    """Load everything, sweep, and return the document; appends the texts to `texts`."""
    assert settings.sweep is not None
    name, strengths = (*settings.attribute, *settings.erase)[0], parse_strengths(settings.sweep)
    scorer = settings.scorer or default_scorer(name)
    # Without words to exclude the scorer needs no model, so its errors come before one is loaded.
    loaded = None if settings.exclude_list_words else load_scorer(scorer)
    if loaded is not None:
        label_of(name, loaded, settings.score_label)
    answers = read_answer_pairs(settings.answers) if settings.answers else []
    labelled = read_labelled(settings.detect) if settings.detect else []
    session = open_session(settings.model, settings.adapter, settings)
    reference_model = None
    if settings.reference_model is not None:
        reference_model = load_base(settings.reference_model, replace(settings, revision=None))
    chat = uses_chat_template(session, settings.uses_template)
    processes = join(input_device(session.base.model))
    only_erased = not settings.attribute
    swept = find_attribute(session, name, settings.attributes, report, for_steering=not only_erased)
    others = [(find_attribute(session, each, settings.attributes, report), s) for each, s in settings.strengths.items()]
    erased = [find_attribute(session, each, settings.attributes, report, False) for each in settings.erase]
    excluded: set[str] = set()
    if loaded is None:
        excluded = list_words(session, [swept, *(attribute for attribute, _ in others), *erased])
        loaded = load_scorer(scorer, excluded)
    label = label_of(name, loaded, settings.score_label)
    detected: dict[str, Any] = {}
    if settings.detect:
        with bare(session):
            wanted = settings.score_label or name
            detected["detection"] = detection(session, swept, labelled, wanted, settings.detect, report)
    layers = chosen_layers(session.base.model, settings.layers)
    directions = erased_directions(session, erased, layers)

    def steering(s: float) -> AbstractContextManager[Any]:
        terms = others if only_erased else [(swept, s), *others]
        return steered(session, terms, layers, settings.scope, directions, s if only_erased else 1.0)

    ours = Method(BRACES_METHOD, strengths, steering, scope=settings.scope)
    baselines = baseline_methods(session, settings.baseline_names, swept, strengths, layers, settings.scope, report)
    measurement = TextMeasurement(
        session, loaded, {name: label}, settings.sampling, settings.num_samples, settings.batch_size, chat,
        reference_model, processes, report,
    )  # fmt: skip
    return {
        "attribute": name,
        "model": session.base.name,
        "adapter": settings.adapter,
        "other_attributes": settings.strengths,
        "erased": list(settings.erase),
        "reference_model": settings.reference_model,
        "prompts": len(prompts),
        "scope": settings.scope,
        "samples": settings.num_samples,
        "seed": settings.seed,
        "stop": list(settings.stop),
        "scorer": scorer,
        "label": label,
        "excluded_words": sorted(excluded),
        "apply_chat_template": chat,
        **sweep(measurement, prompts, ours, baselines, answers, settings.max_kl, texts.extend),
        **detected,
    }
