"""Duration of `braces ... --help` against a process that only imports typer and rich; and of `braces train --check` and
`--dry-run`, which need no weights, against a process that only loads the tokenizer.

python recipes/bench/startup.py
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from common import interleave, medians, parse, ratio, report, timed

REPEATS = 15
COMMANDS = ("", "train", "eval", "attr-build", "steer", "inspect")
BASE = "import typer, rich"
TARGET = 3.0
TOKENIZER = "import sys; from transformers import AutoTokenizer; AutoTokenizer.from_pretrained(sys.argv[1])"
TOKENIZER_TARGET = 1.5


def process(*argv: str) -> Callable[[], None]:
    """Return a run of Python with `argv`, from start to exit."""

    def work() -> None:
        done = subprocess.run([sys.executable, *argv], capture_output=True, text=True)
        if done.returncode:
            # A process that fails early would seem fast.
            sys.exit(f"python {' '.join(argv)}: exit code {done.returncode}\n{done.stderr}")

    return work


def without_weights(folder: Path) -> dict[str, Callable[[], None]]:
    """Return runs that check rows, plan a training run, and load the tokenizer of the embedded model."""
    from braces_cli.core.models.hub import embedded_folder

    rows = folder / "rows.jsonl"
    rows.write_text('{"text": "a day in the old town"}\n' * 16, encoding="utf-8")
    model = str(embedded_folder())
    train = ["-m", "braces_cli", "train", "--model", model, "--data", str(rows), "--format", "json"]
    return {
        "tokenizer": process("-c", TOKENIZER, model),
        "check": process(*train, "--check"),
        "dry run": process(*train, "--dry-run", "--output-dir", str(folder / "out")),
    }


def main() -> None:
    args = parse(__doc__, None, REPEATS)
    programs = {"import": process("-c", BASE)}
    for command in COMMANDS:
        programs[f"braces {command}".strip()] = process("-m", "braces_cli", *([command] if command else []), "--help")
    # The first round writes the byte code.
    warmup = 0 if args.quick else 2
    times = interleave({name: timed(work) for name, work in programs.items()}, args.repeats, args.seconds, warmup)
    with tempfile.TemporaryDirectory(prefix="braces-bench-") as folder:
        plans = without_weights(Path(folder))
        planned = interleave({name: timed(work) for name, work in plans.items()}, args.repeats, args.seconds, warmup)
    seconds = medians(times)
    slowest = max((name for name in programs if name != "import"), key=seconds.__getitem__)
    ratios = {
        "help_vs_import": ratio(times[slowest], times["import"], TARGET),
        "check_vs_tokenizer": ratio(planned["check"], planned["tokenizer"], TOKENIZER_TARGET),
        "dry_run_vs_tokenizer": ratio(planned["dry run"], planned["tokenizer"], TOKENIZER_TARGET),
    }
    settings = {
        "base": BASE,
        "repeats": len(times["import"]),
        "quick": args.quick,
        "help_vs_import": f"the slowest command: {slowest} --help",
        "tokenizer": TOKENIZER,
        "seconds": seconds | medians(planned),
        "commands": {name: ratio(times[name], times["import"], TARGET) for name in programs if name != "import"},
    }
    report(settings, ratios)


if __name__ == "__main__":
    main()
