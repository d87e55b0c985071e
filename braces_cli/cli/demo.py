"""`braces demo`: the whole pipeline on the embedded model, one command after another."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from braces_cli.cli import options as o
from braces_cli.cli.console import print_json, print_table, set_up


def demo(
    output_dir: Annotated[Path, typer.Option("--output-dir", help="Folder for everything that the demo makes.")] = Path(
        "demo"
    ),
    seed: o.Seed = 0,
    overwrite: o.Overwrite = False,
    config: o.Config = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the commands and stop; writes nothing.")] = False,
    fmt: o.FormatOption = o.Format.table,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Fine-tune, evaluate, steer, inspect and merge on the small model that braces brings: no hub, no GPU, no data.

    Prints the command that each step stands for, and leaves a folder with a page that shows it all.
    """
    set_up(quiet, debug)
    from braces_cli.cli.demo_page import write_page
    from braces_cli.cli.demo_steps import Guide, run_demo
    from braces_cli.core.utils.atomic_files import check_output_folder, write_json

    if not dry_run:
        import torch

        check_output_folder(output_dir, overwrite)
        # Matrices this small take longer on two threads than on one.
        torch.set_num_threads(1)
    # With JSON on stdout the story is told on stderr.
    guide = Guide(output_dir, seed, None if quiet else sys.stderr if fmt is o.Format.json else sys.stdout, dry_run)
    result = run_demo(guide)
    if dry_run:
        if fmt is o.Format.json:
            print_json({"commands": [step["command"] for step in result["steps"]]})
        return
    write_json(output_dir / "demo.json", result)
    page = write_page(result, output_dir)
    if fmt is o.Format.json:
        print_json(result | {"page": str(page)})
        return
    print()
    print_table("What it did", ["", ""], summary(result))
    print(f"Everything is in {output_dir}; open {page}")


def summary(result: dict[str, Any]) -> list[tuple[str, str]]:
    """Rows of the closing table: what, and the figures."""
    points = result["sweep"]["points"]
    rows = [
        (task["title"], ", ".join(f"{system['name']} {system['value']:.1%}" for system in task["systems"]))
        for task in result["scores"]
    ]
    return [
        *rows,
        ("positive texts", ", ".join(f"{point['attribute_score']:.0%} at {point['s']:+g}" for point in points)),
        ("merged checkpoint", f"logits within {result['merge']['max_logit_difference']:.1e} of the adapter's"),
        ("time", f"{result['seconds']:.0f} s"),
    ]
