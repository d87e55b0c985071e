"""`braces eval`: score a base and its adapters side by side."""

import logging
import os
from typing import Any

import typer

from braces_cli.cli.options import command, show_plan
from braces_cli.cli.output import note, print_json, print_table, progress, set_up
from braces_cli.core.distributed import is_main
from braces_cli.core.errors import BracesError
from braces_cli.core.text import one_line
from braces_cli.evaluation.settings import EvalSettings

# Columns that say what a row of the table is.


@command
def evaluate(settings: EvalSettings) -> None:
    """Score a base and its adapters (braces or peft), steered or not, on benchmarks, or on texts of your own."""
    # Of several processes only the first prints.
    quiet = settings.quiet or not is_main()
    set_up(quiet, settings.debug)
    _silence_lm_eval(settings.debug)
    if settings.dry_run:
        _dry_run(settings)
        return
    from braces_cli.core.files import output_lock

    with output_lock(settings.output_dir, settings.plot):
        _evaluate(settings, quiet)


def _evaluate(settings: EvalSettings, quiet: bool) -> None:
    """Measure, write and print; nobody else writes to the outputs meanwhile."""
    from braces_cli.core.files import check_output_file
    from braces_cli.evaluation.results import Store, check_folder
    from braces_cli.evaluation.run import run_evaluation

    replace = settings.overwrite or settings.resume
    if is_main():
        check_folder(
            settings.output_dir,
            overwrite=settings.overwrite,
            resume=settings.resume,
            log_samples=settings.log_samples,
        )
        if settings.plot is not None:
            check_output_file(settings.plot, replace)
    store = Store(settings.output_dir, log_samples=settings.log_samples)
    with progress(quiet) as report:
        result = run_evaluation(settings.model, settings.adapter, settings, settings, report, store, settings.resume)
    if result is not None:
        _show(result, settings)


def _show(result: dict[str, Any], settings: EvalSettings) -> None:
    """Write and print the result.

    Raises:
        typer.Exit: with 5, where a threshold is not reached.
    """
    from braces_cli.core.files import finite, write_json, write_text
    from braces_cli.evaluation import tables
    from braces_cli.evaluation.results import RESULTS

    if settings.plot is not None:
        tables.draw(result, settings.plot)
    if settings.output_dir is not None:
        write_text(settings.output_dir / "results.md", tables.markdown(result))
        write_json(settings.output_dir / RESULTS, finite(result))
    if settings.json:
        print_json(result)
    else:
        _print(result)
    missed = [row for row in result.get("fail_under", ()) if not row["reached"]]
    if missed:
        # The result stands as it is; one JSON document is on stdout already.
        lines = [f"Error: --fail-under: {tables.threshold_line(row)}" for row in missed]
        note("\n".join(map(one_line, lines)))
        raise typer.Exit(5)


def _print(result: dict[str, Any]) -> None:
    from braces_cli.evaluation import tables

    facts = tables.facts(result)
    shown = [f"{name} {facts[name]}" for name in ("revision", "limit", "dtype") if name in facts]
    print_table(f"{facts['model']} ({', '.join(shown)})", *tables.main_table(result))
    columns, rows = tables.pair_table(result)
    if rows:
        print_table(tables.PAIRS, columns, rows)
    columns, rows = tables.slope_table(result)
    if rows:
        print_table(tables.SLOPES, columns, rows)


def _silence_lm_eval(debug: bool) -> None:
    """Only errors in lm-eval's log, and no bars that it draws unasked. Call before anything imports tqdm."""
    if debug:
        return
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    for name in ("lm_eval", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _dry_run(settings: EvalSettings) -> None:
    """Print settings, tasks and parameter count; where the adapter or base cannot be reached, why not."""
    from braces_cli.core.adapter.files import parameter_count
    from braces_cli.core.adapter.model import base_name
    from braces_cli.core.models.load import load_shape
    from braces_cli.evaluation.run import check_settings
    from braces_cli.evaluation.systems import find_eval_adapter

    selection, _, _ = check_settings(settings)
    out: dict[str, Any] = {"tasks": [*selection.leaves, *selection.native]}
    try:
        adapters = [find_eval_adapter(name) for name in settings.adapter]
        counts = [None if each.stored is None else parameter_count(each.stored.config) for each in adapters]
        out["model"] = settings.model or (adapters[0].base if adapters else base_name(None, None))
        code = settings.trust_remote_code
        shape = load_shape(out["model"], revision=settings.revision, trust_remote_code=code)
        out["total_parameters"] = sum(p.numel() for p in shape.parameters())
        out["trainable_parameters"] = counts[0] if len(counts) == 1 else counts or 0
    except BracesError as error:
        out.update({"trainable_parameters": None, "reason": str(error).replace("\n", " ")})
    show_plan(settings, out)
