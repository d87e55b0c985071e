"""`braces eval`: score a base and its adapters side by side."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from braces_cli.cli import options as o
from braces_cli.cli.render import print_json, print_table, progress, set_up
from braces_cli.core.errors import BracesError, ConfigError


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
            "--tasks", help="truthfulqa, triviaqa, popqa, perplexity or any of lm-eval's; commas between them."
        ),
    ] = None,
    task_data: Annotated[
        list[str] | None,
        typer.Option("--task-data", metavar="NAME=FILE", help="Rows of a task from a local file. Repeatable."),
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Documents of each task, from the front.")] = None,
    num_fewshot: Annotated[
        int | None, typer.Option("--num-fewshot", min=0, help="Examples in front of each. Default: the task's own.")
    ] = None,
    batch_size: Annotated[str, typer.Option("--batch-size", help="Sequences a forward pass, or auto.")] = "8",
    seed: Annotated[
        int | None, typer.Option("--seed", min=0, help="Of every random choice. Default: lm-eval's own seeds.")
    ] = None,
    no_base: Annotated[bool, typer.Option("--no-base", help="Measure the adapters only.")] = False,
    output_dir: Annotated[Path | None, typer.Option("--output-dir", help="Also write results.json there.")] = None,
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
    """Score a base and its adapters on benchmarks, or on texts of your own."""
    set_up(quiet, debug)
    _hush_lm_eval(debug)
    if not tasks:
        raise ConfigError("missing option", where="--tasks", hint="Such as --tasks truthfulqa,popqa,triviaqa.")
    from braces_cli.core.files import check_output_folder, write_json
    from braces_cli.evaluation.run import EvalSettings, run_evaluation

    settings = EvalSettings(
        tasks,
        task_data or (),
        limit,
        num_fewshot,
        int(batch_size) if batch_size.isdecimal() else batch_size,
        seed,
        not no_base,
    )
    if dry_run:
        _dry_run(ctx, settings, fmt)
        return
    if output_dir is not None:
        check_output_folder(output_dir, overwrite)
    with progress(quiet) as report:
        result = run_evaluation(model, adapter or (), o.load_options(ctx), settings, report)
    if output_dir is not None:
        write_json(output_dir / "results.json", result)
    if fmt is o.Format.json:
        print_json(result)
    else:
        print_table(*_table(result))


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
    from braces_cli.core.adapter import read_config
    from braces_cli.core.models import load_shape
    from braces_cli.core.session import adapter_folder, base_name
    from braces_cli.evaluation.run import check_settings

    selection, _, _ = check_settings(settings)
    out: dict[str, Any] = {"tasks": [*selection.leaves, *(["perplexity"] if selection.perplexity else [])]}
    adapters = ctx.params["adapter"] or ()
    try:
        counts = []
        for name in adapters:
            found = read_config(adapter_folder(name))
            counts.append(len(found.layers) * (found.r * found.fingerprint["hidden_size"] + 1))
        out["model"] = base_name(ctx.params["model"], adapters[0] if adapters else None)
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


def _table(result: dict[str, Any]) -> tuple[str, list[str], list[list[Any]]]:
    """Title, columns and rows: a row a metric, a column a system, and after each adapter its change and p."""
    systems = result["systems"]
    differences = {(c["task"], c["metric"], c["to"]): c for c in result["comparisons"]}
    columns = ["task", "metric", "n", systems[0]["name"]]
    for system in systems[1:]:
        columns += [system["name"], "change", "p"]
    rows: list[list[Any]] = []
    for task, metrics in systems[0]["results"].items():
        for metric, first in metrics.items():
            row = [task, metric, first["n"], _with_error(first)]
            for system in systems[1:]:
                compared = differences[task, metric, system["name"]]
                row += [_with_error(system["results"][task][metric])]
                row += [f"{compared['difference']:+.4g}", compared["p_value"]]
            rows.append(row)
    return f"{systems[0]['model']}, value ± standard error", columns, rows


def _with_error(entry: dict[str, Any]) -> str:
    error = entry["stderr"]
    return f"{entry['value']:.4g}" + ("" if error is None else f" ± {error:.2g}")
