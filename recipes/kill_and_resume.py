"""Kill training runs at random moments, resume each, and compare the adapters with that of a run left alone.

Each run is a process of its own that writes a checkpoint every other step. It dies by SIGKILL a random moment after a
random one of them (or before the first), in the midst of a step or of the next checkpoint. It is then resumed, possibly
to be killed again. The adapters must agree in every bit. A run that had ended by then is started anew, so that every
run counted was killed. Prints one JSON document; the exit code is 1 where a single bit differs.

    python recipes/kill_and_resume.py --model FOLDER --data rows.jsonl [--runs 20] [--kills 1] [--steps 30] [--seed 0]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Processes fork from one that has imported everything, so that a start costs nothing.
_PRELOAD = [
    "braces_cli.cli.train", "braces_cli.training.trainer", "braces_cli.training.train", "matplotlib.figure",
    "matplotlib.backends.backend_agg", "transformers.models.llama.modeling_llama",
]  # fmt: skip
_DEADLINE = 600.0


def train(args: Sequence[str]) -> None:
    """Body of a process: `braces train`, its words thrown away."""
    from braces_cli.cli.app import main

    sys.stdout = open(os.devnull, "w")  # noqa: SIM115  for as long as the process lives
    main(["train", *args])


def start(args: Sequence[str]) -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    process = context.Process(target=train, args=(list(args),))
    process.start()
    return process


def finish(args: Sequence[str]) -> float:
    """Run to the end; return the seconds it took."""
    began = time.perf_counter()
    process = start(args)
    process.join(_DEADLINE)
    if process.exitcode != 0:
        process.kill()
        raise SystemExit(f"a run ended with exit code {process.exitcode}")
    return time.perf_counter() - began


def newest(folder: Path) -> int:
    """Step of the newest checkpoint in an output folder, 0 where there is none."""
    return max((int(path.name.rpartition("-")[2]) for path in folder.glob("checkpoint-*")), default=0)


def kill(args: Sequence[str], out: Path, step: int, after: float) -> bool:
    """Start a run and kill it so many seconds after its checkpoint of `step`; False where it had ended by then."""
    process = start(args)
    while newest(out) < step and process.is_alive():
        time.sleep(0.001)
    process.join(after)
    process.kill()
    process.join()
    return bool(process.exitcode == -9)


def compare(
    model: str, data: str, folder: Path, runs: int, kills: int, steps: int, seed: int, options: Sequence[str] = ()
) -> dict[str, Any]:
    """Kill and resume `runs` runs in `folder`; return what happened to each."""
    common = [
        *("--model", model, "--data", data, "--device", "cpu", "--max-steps", str(steps), "--save-steps", "2"),
        *("--lr", "0.01", "--quiet", *options),
    ]
    finish([*common, "--output-dir", str(folder / "warm-up")])
    seconds = finish([*common, "--output-dir", str(folder / "alone")])
    wanted = (folder / "alone" / "adapter_model.safetensors").read_bytes()
    moments, outcomes = random.Random(seed), []
    for number in range(runs):
        out = folder / f"run-{number}"
        args = [*common, "--output-dir", str(out), "--resume"]
        killed, left = 0, []
        while killed < kills:
            step = moments.randrange(min(newest(out), steps - 2), steps, 2)
            if kill(args, out, step, moments.uniform(0.0, 4 * seconds / steps)):
                killed += 1
                left.append(sorted(path.name for path in out.iterdir()) if out.is_dir() else [])
            else:
                shutil.rmtree(out)
                killed, left = 0, []
        reached = newest(out)
        finish(args)
        same = (out / "adapter_model.safetensors").read_bytes() == wanted
        torn = any(name.startswith(".") for names in left for name in names)
        outcomes.append({"killed": killed, "newest_checkpoint": reached, "half_written_file": torn, "identical": same})
    return {
        "runs": runs,
        "killed": sum(outcome["killed"] for outcome in outcomes),
        "caught_writing": sum(outcome["half_written_file"] for outcome in outcomes),
        "identical": sum(outcome["identical"] for outcome in outcomes),
        "seconds_a_run": seconds,
        "steps": steps,
        "seed": seed,
        "outcomes": outcomes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--kills", type=int, default=1, help="of each run")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="braces-kill-") as folder:
        found = compare(args.model, args.data, Path(folder), args.runs, args.kills, args.steps, args.seed)
    print(json.dumps(found, indent=2))
    sys.exit(0 if found["identical"] == found["runs"] else 1)


if __name__ == "__main__":
    main()
