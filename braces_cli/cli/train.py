"""`braces train`: fine-tune an adapter; `--check` reports on the rows without loading weights."""

import sys
from typing import Any

from rich.filesize import decimal

from braces_cli.cli.options import command, show_plan
from braces_cli.cli.output import print_json, print_pairs, print_table, progress
from braces_cli.core.errors import BracesError, ConfigError
from braces_cli.training.settings import TrainSettings


# Labels of the fields of the result.
@command
def train(settings: TrainSettings) -> None:
    """Fine-tune an adapter, or a baseline of peft, on texts, prompts and completions, instructions or chats."""
    from braces_cli.core.distributed import is_main

    quiet = settings.quiet or not is_main()
    if settings.check_rows:
        _check(settings)
        return
    if settings.dry_run:
        _plan(settings)
        return
    from braces_cli.core.models.hub import ADAPTER_FILES, push
    from braces_cli.training.run import train as run

    with progress(quiet) as report:
        result = run(settings, report, ["braces", *sys.argv[1:]])
    if is_main():
        if settings.push_to_hub is not None and settings.output_dir is not None:
            again = "the same command with --resume tries the upload again"
            push(settings.output_dir, settings.push_to_hub, ADAPTER_FILES, again)
        _show(settings, f"adapter written to {settings.output_dir}", result)


def _plan(settings: TrainSettings) -> None:
    """Print the resolved settings and the parameter count; or why the model cannot be read."""
    from braces_cli.training.run import resolve

    out: dict[str, Any] = {"output_dir": settings.output_dir and str(settings.output_dir), "method": settings.method}
    try:
        plan = resolve(settings)
    except ConfigError:
        # A rank or a layer that does not fit is an error of the settings.
        raise
    except BracesError as error:
        out.update({"trainable_parameters": None, "reason": str(error).replace("\n", " ")})
    else:
        out.update(plan.counts)
        settings = plan.settings
    show_plan(settings, out, settings.unused())


def _show(settings: TrainSettings, title: str, result: dict[str, Any]) -> None:
    if settings.json:
        print_json(result)
        return
    shown = {**result, "peak_memory": decimal(result["peak_memory"]), "padding_share": f"{result['padding_share']:.1%}"}
    print_pairs(title, shown)


def _check(settings: TrainSettings) -> None:
    """Read and tokenise all rows and print statistics, by option name."""
    from braces_cli.data.dataset import check_rows
    from braces_cli.training.run import resolve

    plan = resolve(settings)
    with progress(settings.quiet) as report:
        sets = {"data": (settings.data, plan.reading), "eval_data": (settings.eval_data, plan.eval_reading)}
        found = {name: check_rows(*source, report) if source[0] else None for name, source in sets.items()}
    if settings.json:
        print_json(found)
        return
    for source, statistics in found.items():
        if statistics is not None:
            _show_rows(source, statistics)


def _show_rows(source: str, found: dict[str, Any]) -> None:
    """Print the statistics of one option's rows as tables."""
    counts = {name: value for name, value in found.items() if not isinstance(value, (list, dict))}
    lengths = {f"length, {name}": value for name, value in found["lengths"].items()}
    print_pairs(source, {**counts, **lengths})
    print_table("formats", ["format", "rows"], found["formats"].items())
    if found["notes"]:
        print_table("notes", ["note", "rows"], found["notes"].items())
    if found["attributes"]:
        rows = [(name, count, *found["strengths"][name].values()) for name, count in found["attributes"].items()]
        print_table("attributes and their strengths", ["attribute", "rows", "least", "mean", "most"], rows)
    if found["dropped_at"]:
        print_table("rows without a text to score", [""], [[where] for where in found["dropped_at"]])
    texts = [
        [shown["where"], "".join(f"[[{p['text']}]]" if p["scored"] else p["text"] for p in shown["parts"])]
        for shown in found["shown"]
    ]
    print_table("examples, with scored text in double brackets", ["row", "text"], texts)
