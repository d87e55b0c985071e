"""How long `braces ... --help` takes as a whole process, against a process that only imports typer and rich.

python recipes/bench/startup.py
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

from _bench import interleave, medians, parse, ratio, report, timed

REPEATS = 15
COMMANDS = ("", "train", "eval", "attr-build", "steer", "inspect")
BASE = "import typer, rich"
TARGET = 3.0


def process(*argv: str) -> Callable[[], None]:
    """Run Python with `argv`, from start to exit."""

    def work() -> None:
        done = subprocess.run([sys.executable, *argv], capture_output=True, text=True)
        if done.returncode:
            # A process that fails early would look fast.
            sys.exit(f"python {' '.join(argv)}: exit code {done.returncode}\n{done.stderr}")

    return work


def main() -> None:
    args = parse(__doc__, None, REPEATS)
    programs = {"import": process("-c", BASE)}
    for command in COMMANDS:
        programs[f"braces {command}".strip()] = process("-m", "braces_cli", *([command] if command else []), "--help")
    # The first round also writes the byte code.
    times = interleave({name: timed(work) for name, work in programs.items()}, args.repeats, args.seconds)
    seconds = medians(times)
    slowest = max((name for name in programs if name != "import"), key=seconds.__getitem__)
    ratios = {"help_vs_import": ratio(times[slowest], times["import"], TARGET)}
    settings = {
        "base": BASE,
        "repeats": len(times["import"]),
        "quick": args.quick,
        "help_vs_import": f"the slowest command: {slowest} --help",
        "seconds": seconds,
        "commands": {name: ratio(times[name], times["import"], TARGET) for name in programs if name != "import"},
    }
    report(settings, ratios)


if __name__ == "__main__":
    main()
