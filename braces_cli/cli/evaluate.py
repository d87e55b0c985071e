"""`braces eval`: score a base and its adapters side by side."""

import logging
import os
from typing import Any

import typer

from braces_cli.cli.options import command, show_plan
from braces_cli.cli.output import note, print_json, print_table, progress
from braces_cli.core.distributed import is_main
from braces_cli.core.errors import BracesError
from braces_cli.core.text import one_line
from braces_cli.evaluation.settings import EvalSettings


@command
def evaluate(settings: EvalSettings) -> None:
    """Score a base and its adapters (braces or PEFT), steered or not, on benchmarks or on your own texts."""
    # Of several processes only the first prints.
    quiet = settings.quiet or not is_main()
    if not settings.debug:
        # lm-eval draws progress bars; tqdm reads the variable when it is imported.
        os.environ.setdefault("TQDM_DISABLE", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        for name in ("lm_eval", "datasets"):
            logging.getLogger(name).setLevel(logging.ERROR)
    if settings.dry_run:
        _dry_run(settings)
        return
    from braces_cli.core.files import check_output_folder, output_lock
    from braces_cli.evaluation.run import run_evaluation

    with output_lock(settings.output_dir):
        replace = settings.overwrite or settings.resume
        if is_main() and settings.output_dir is not None:
            hint = "Give another one; --resume continues a run there, --overwrite starts a new one."
            check_output_folder(settings.output_dir, replace, hint)
        with progress(quiet) as report:
            result = run_evaluation(settings, report)
        if result is not None:
            _show(result, settings)


def _show(result: dict[str, Any], settings: EvalSettings) -> None:
    """Write and print the result; exit with 5 if a threshold is not reached."""
    from braces_cli.core.files import finite, write_json, write_text
    from braces_cli.evaluation import tables
    from braces_cli.evaluation.results import RESULTS

    if settings.output_dir is not None:
        write_text(settings.output_dir / "results.md", tables.markdown(result))
        write_json(settings.output_dir / RESULTS, finite(result))
    if settings.json:
        print_json(result)
    else:
        facts = tables.facts(result)
        shown = [f"{name} {facts[name]}" for name in ("revision", "limit", "dtype") if name in facts]
        main, *others = tables.result_tables(result)
        title = f"{facts['model']} ({', '.join(shown)}){main[0].removeprefix('evaluation')}"
        print_table(title, *main[1:])
        for title, columns, rows in others:
            print_table(title, columns, rows)
    missed = [row for row in result.get("fail_under", ()) if not row["reached"]]
    if missed:
        # Not an exception: the result is valid, and stdout has its one JSON document.
        lines = [f"Error: --fail-under: {tables.threshold_line(row)}" for row in missed]
        note("\n".join(map(one_line, lines)))
        raise typer.Exit(5)


def _dry_run(settings: EvalSettings) -> None:
    """Print settings, tasks and parameter counts, or the reason if the adapter or base cannot be loaded."""
    from braces_cli.core.models.load import load_shape
    from braces_cli.evaluation.run import check_settings
    from braces_cli.evaluation.systems import find_eval_adapter, resolve_base

    selection, _, _ = check_settings(settings)
    out: dict[str, Any] = {"tasks": [*selection.leaves, *selection.native]}
    try:
        adapters = [find_eval_adapter(name) for name in settings.adapter]
        counts = [None if each.stored is None else each.stored.config.parameters for each in adapters]
        out["model"], revision = resolve_base(settings.model, settings.revision, adapters)
        shape = load_shape(out["model"], revision=revision, trust_remote_code=settings.trust_remote_code)
        out["total_parameters"] = sum(p.numel() for p in shape.parameters())
        out["trainable_parameters"] = counts[0] if len(counts) == 1 else counts or 0
    except BracesError as error:
        out.update({"trainable_parameters": None, "reason": str(error).replace("\n", " ")})
    show_plan(settings, out)
