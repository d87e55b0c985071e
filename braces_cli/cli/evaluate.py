"""`braces eval`: score a base and its adapters side by side."""

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from braces_cli.cli import options as o
from braces_cli.cli.console import print_json, print_table, progress, set_up
from braces_cli.core.utils.errors import BracesError, ConfigError


def evaluate(
    ctx: typer.Context,
    model: o.Model = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option("--adapter", help="Adapter to measure beside the base: folder or hub id. Repeatable."),
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            "--tasks",
            help="zero_shot, commonsense, commonsense_gen, truthfulqa, popqa (popqa_by_relation, popqa_by_popularity), "
            "perplexity, sentiment, toxicity or any of lm-eval's; commas between them.",
        ),
    ] = None,
    task_data: Annotated[
        list[str] | None,
        typer.Option("--task-data", metavar="NAME=FILE", help="Rows of a task from a file or folder. Repeatable."),
    ] = None,
    task_data_dir: Annotated[
        Path | None,
        typer.Option("--task-data-dir", help="Folder with files (NAME.jsonl, ...) or folders called as the tasks."),
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Documents of each task, from the front.")] = None,
    num_fewshot: Annotated[
        int | None, typer.Option("--num-fewshot", min=0, help="Examples in front of each. Default: the task's own.")
    ] = None,
    apply_chat_template: Annotated[
        bool | None,
        typer.Option(
            "--apply-chat-template/--no-apply-chat-template",
            help="Ask in the tokenizer's chat template. Default: as the adapters were trained.",
        ),
    ] = None,
    batch_size: Annotated[
        str, typer.Option("--batch-size", help="Sequences a forward pass, or auto; halved where memory is short.")
    ] = "8",
    seed: Annotated[
        int | None, typer.Option("--seed", min=0, help="Of every random choice. Default: lm-eval's own seeds.")
    ] = None,
    no_base: Annotated[bool, typer.Option("--no-base", help="Measure the adapters only.")] = False,
    fail_under: Annotated[
        list[str] | None,
        typer.Option(
            "--fail-under",
            metavar="TASK:METRIC=VALUE",
            help="Exit with 5 where an adapter (the base if there is none) is worse than this. Repeatable.",
        ),
    ] = None,
    attribute: Annotated[
        list[str] | None,
        typer.Option("--attribute", help="sentiment, toxicity: steer every system by it while it writes. Repeatable."),
    ] = None,
    s: Annotated[list[float] | None, typer.Option("--s", help="Strength; the k-th belongs to the k-th.")] = None,
    attributes: Annotated[Path | None, typer.Option("--attributes", help="Folder that attr-build wrote.")] = None,
    scorer: Annotated[
        list[str] | None,
        typer.Option(
            "--scorer",
            metavar="TASK=SCORER",
            help="vader, toxicity, fit:ROWS, or a classifier's folder or hub id. Repeatable.",
        ),
    ] = None,
    num_samples: Annotated[int, typer.Option("--num-samples", min=1, help="Texts for each prompt.")] = 1,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Of a continued prompt.")] = 50,
    temperature: Annotated[float, typer.Option("--temperature", help="Of continued prompts; 0 is greedy.")] = 1.0,
    top_p: Annotated[float, typer.Option("--top-p", help="Of continued prompts.")] = 0.9,
    judge_model: Annotated[
        str | None, typer.Option("--judge-model", help="Tells the continuations' perplexity in place of the base.")
    ] = None,
    exclude_list_words: Annotated[
        bool, typer.Option("--exclude-list-words", help="Scorers do not look at the attributes' own words.")
    ] = False,
    output_dir: Annotated[
        Path | None, typer.Option("--output-dir", help="Folder for results.json and results.md, task by task.")
    ] = None,
    log_samples: Annotated[
        bool, typer.Option("--log-samples", help="Also write prompt, answer and scores of each document there.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the tasks that --output-dir lacks.")] = False,
    plot: Annotated[Path | None, typer.Option("--plot", help="PNG file: each metric of each system.")] = None,
    overwrite: o.Overwrite = False,
    revision: o.Revision = None,
    device: o.Device = "auto",
    dtype: o.DtypeOption = o.Dtype.auto,
    device_map: o.DeviceMap = None,
    quantize: o.Quantize = None,
    trust_remote_code: o.TrustRemoteCode = False,
    config: o.Config = None,
    dry_run: o.DryRun = False,
    fmt: o.FormatOption = o.Format.table,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Score a base and its adapters (braces or peft) on benchmarks, or on texts of your own."""
    first = os.environ.get("RANK", "0") == "0"
    # Of several processes one speaks.
    quiet = quiet or not first
    set_up(quiet, debug)
    _hush_lm_eval(debug)
    if not tasks:
        raise ConfigError("missing option", where="--tasks", hint="Such as --tasks truthfulqa,popqa,triviaqa.")
    from braces_cli.cli.eval_generation import generation
    from braces_cli.core.utils.atomic_files import check_output_file
    from braces_cli.evaluation.evaluate import EvalSettings, run_evaluation
    from braces_cli.evaluation.result_store import Store, check_folder

    settings = EvalSettings(
        tasks,
        task_data or (),
        limit,
        num_fewshot,
        int(batch_size) if batch_size.isdecimal() else batch_size,
        seed,
        not no_base,
        task_data_dir,
        apply_chat_template,
        fail_under or (),
        generation(ctx),
    )
    if dry_run:
        _dry_run(ctx, settings, fmt)
        return
    if first:
        check_folder(output_dir, overwrite=overwrite, resume=resume, log_samples=log_samples)
        if plot is not None:
            check_output_file(plot, overwrite or resume)
    store = Store(output_dir, log_samples=log_samples)
    with progress(quiet) as report:
        result = run_evaluation(model, adapter or (), o.load_options(ctx), settings, report, store, resume)
    if result is not None:
        _give(result, output_dir, plot, fmt)


def _give(result: dict[str, Any], folder: Path | None, plot: Path | None, fmt: o.Format) -> None:
    """Write and print the result, then judge it."""
    from braces_cli.core.utils.atomic_files import finite, write_json, write_text
    from braces_cli.evaluation import result_tables as page
    from braces_cli.evaluation.result_store import RESULTS

    if plot is not None:
        page.draw(result, plot)
    if folder is not None:
        write_text(folder / "results.md", page.markdown(result))
        write_json(folder / RESULTS, finite(result))
    if fmt is o.Format.json:
        print_json(result)
    else:
        _print(result)
    missed = [row for row in result.get("fail_under", ()) if not row["reached"]]
    if missed:
        # The result stands as it is; one JSON document is on stdout already.
        lines = [f"Error: --fail-under: {page.threshold_line(row)}" for row in missed]
        print("\n".join(lines), file=sys.stderr)
        raise typer.Exit(5)


def _print(result: dict[str, Any]) -> None:
    from braces_cli.evaluation import result_tables as page

    facts = page.facts(result)
    shown = [f"{name} {facts[name]}" for name in ("revision", "limit", "dtype") if name in facts]
    print_table(f"{facts['model']} ({', '.join(shown)})", *page.main_table(result))
    columns, rows = page.pair_table(result)
    if rows:
        print_table("adapters among themselves", columns, rows)


def _hush_lm_eval(debug: bool) -> None:
    """Only errors in its log, and none of the bars that it draws unasked. Call before anything imports tqdm."""
    import logging

    if debug:
        return
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    for name in ("lm_eval", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _dry_run(ctx: typer.Context, settings: Any, fmt: o.Format) -> None:
    """Settings, tasks and parameter count; where the adapter or base cannot be reached, why not."""
    from braces_cli.core.method.adapter_files import parameter_count
    from braces_cli.core.models.loading import load_shape
    from braces_cli.core.session import base_name
    from braces_cli.evaluation.adapter_switching import find_eval_adapter
    from braces_cli.evaluation.evaluate import check_settings

    selection, _, _ = check_settings(settings)
    out: dict[str, Any] = {"tasks": [*selection.leaves, *selection.own]}
    adapters = ctx.params["adapter"] or ()
    try:
        found = [find_eval_adapter(name) for name in adapters]
        counts = [None if each.stored is None else parameter_count(each.stored.config) for each in found]
        out["model"] = ctx.params["model"] or (found[0].base if found else base_name(None, None))
        code = ctx.params["trust_remote_code"]
        shape = load_shape(out["model"], revision=ctx.params["revision"], trust_remote_code=code)
        out["total_parameters"] = sum(p.numel() for p in shape.parameters())
        out["trainable_parameters"] = counts[0] if len(counts) == 1 else counts or 0
    except BracesError as error:
        out.update({"trainable_parameters": None, "reason": str(error).replace("\n", " ")})
    out["settings"] = o.resolved(ctx)
    if fmt is o.Format.json:
        print_json(out)
    else:
        shown = {**out.pop("settings"), **out}
        print_table("dry run", ("setting", "value"), [(name, _shown(v)) for name, v in shown.items() if v is not None])


def _shown(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
