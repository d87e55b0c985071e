"""Whole commands against what a user would run instead: from the start of the process to its exit, memory included.

    train_vs_trl         braces train / trl sft --use_peft: same rows, steps, batch, dtype, rank and target modules
    train_vs_lora        braces train / braces train --method lora
    eval_vs_lm_eval      braces eval on a base / lm_eval --model hf, on the same rows
    steer_vs_generate    braces steer --attribute / a script around transformers' generate, without steering
    steer_vs_repeng      the same / that script with a control vector of repeng's

Each is also a ratio of peak memory, `NAME, memory`. trl and repeng are measured where --trl-python names a Python that
has them: install them into an environment of their own (pip install trl peft repeng). trl's defaults of mixed precision
and gradient checkpointing are turned off, since braces does neither unless asked to.

    python recipes/bench/end_to_end.py --model stories3M --model reviews10M --rows sst5/train.jsonl \\
        --rows arc_easy/train.jsonl --trl-python TRL_ENVIRONMENT/bin/python [--steps 300] [--only train]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from _bench import LEAST_OF_MINUTES, LEAST_REPEATS, SECONDS, interleave, medians, ratio, report
from evaluation import DOCUMENTS, QUICK, check_equal, write_definitions, write_model, write_rows

RANK, BATCH = 16, 16
TARGETS = {
    "train_vs_trl": 0.35, "train_vs_trl, memory": 0.8, "eval_vs_lm_eval": 0.8, "steer_vs_generate": 1.02,
}  # fmt: skip
PROMPTS, TOKENS, STEER_BATCH = 200, 20, 8
KINDS = ("train", "eval", "steer")


class Programs:
    """Processes that are measured in turns: seconds, and the peak of resident memory."""

    def __init__(self, threads: int | None) -> None:
        self._env = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        if threads:
            self._env["OMP_NUM_THREADS"] = str(threads)
        self.output: dict[str, str] = {}
        self.peaks: dict[str, list[float]] = {}

    def measurement(self, name: str, argv: Sequence[object]) -> Callable[[], float]:
        """A run of `argv`; its standard output stays in `output`."""

        def measure() -> float:
            with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
                start = time.perf_counter()
                child = subprocess.Popen([str(word) for word in argv], stdout=out, stderr=err, env=self._env)
                _, status, usage = os.wait4(child.pid, 0)
                seconds = time.perf_counter() - start
                child.returncode = os.waitstatus_to_exitcode(status)
                for file in (out, err):
                    file.seek(0)
                if child.returncode:
                    sys.exit(f"{name}: exit code {child.returncode}\n{err.read()[-4000:]}")
                self.output[name] = out.read()
            self.peaks.setdefault(name, []).append(usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024))
            return seconds

        return measure

    def measure(self, commands: Mapping[str, Sequence[object]], args: argparse.Namespace) -> dict[str, list[float]]:
        """Seconds of each command; the peaks of the same repeats are left in `peaks`."""
        work = {name: self.measurement(name, argv) for name, argv in commands.items()}
        # No warm-up: it would cost as much as a repeat, and the median leaves out a first one that is slower.
        times = interleave(work, args.repeats, args.seconds, warmup=0, least=LEAST_OF_MINUTES)
        for name in commands:
            self.peaks[name] = self.peaks[name][-len(times[name]) :]
        return times


def compare(programs: Programs, times: Mapping[str, list[float]], name: str, ours: str, theirs: str) -> dict[str, Any]:
    """The ratios of two programs, in time and in memory; what is behind a comma in `name` tells cases apart."""
    kind, _, case = name.partition(",")
    peaks = programs.peaks
    return {
        name: ratio(times[ours], times[theirs], TARGETS.get(kind)),
        f"{kind}, memory{',' if case else ''}{case}": ratio(peaks[ours], peaks[theirs], TARGETS.get(f"{kind}, memory")),
    }


def training_rows(source: Path, folder: Path, most: int) -> Path:
    """A folder with `train.jsonl`: rows as both programs read them, {text} or {prompt, completion}."""
    place = folder / f"rows-{source.parent.name}"
    place.mkdir()
    with source.open(encoding="utf-8") as lines, (place / "train.jsonl").open("w", encoding="utf-8") as out:
        for _, line in zip(range(most), lines, strict=False):
            row = json.loads(line)
            if "instruction" in row:
                row = {"prompt": f"{row['instruction']}\n\n", "completion": row["output"]}
            out.write(json.dumps({key: row[key] for key in ("text", "prompt", "completion") if key in row}) + "\n")
    return place


def training(programs: Programs, args: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Ratios and median seconds of training, for every model and set of rows."""
    ratios: dict[str, Any] = {}
    seconds: dict[str, Any] = {}
    for source in args.rows:
        rows = training_rows(source, folder, 64 if args.quick else 1_000_000)
        for model in args.model:
            case = f"{model.name}, {source.parent.name}"
            ours: list[object] = [
                sys.executable, "-m", "braces_cli", "train", "--model", model, "--data", rows / "train.jsonl",
                "--max-steps", args.steps, "--batch-size", BATCH, "--dtype", args.dtype, "--device", "cpu",
                "--save-steps", 0, "--overwrite", "--format", "json", "--quiet", "--output-dir",
            ]  # fmt: skip
            commands = {
                "braces": [*ours, folder / "out-braces"],
                "lora": [*ours, folder / "out-lora", "--method", "lora", "--rank", RANK],
            }
            if args.trl_python:
                commands["trl"] = [
                    args.trl_python, "-m", "trl.scripts.sft", "--model_name_or_path", model, "--dataset_name", rows,
                    "--use_peft", "--lora_r", RANK, "--lora_alpha", 2 * RANK, "--lora_dropout", 0,
                    "--lora_target_modules", "q_proj", "v_proj", "--max_steps", args.steps,
                    "--per_device_train_batch_size", BATCH, "--learning_rate", "1e-3", "--dtype", args.dtype,
                    "--bf16", "false", "--gradient_checkpointing", "false", "--use_cpu", "true", "--report_to", "none",
                    "--save_strategy", "no", "--output_dir", folder / "out-trl",
                ]  # fmt: skip
            times = programs.measure(commands, args)
            seconds |= {f"{name}, {case}": value for name, value in medians(times).items()}
            if args.trl_python:
                ratios |= compare(programs, times, f"train_vs_trl, {case}", "braces", "trl")
            ratios |= compare(programs, times, f"train_vs_lora, {case}", "braces", "lora")
    return ratios, seconds


def evaluation(programs: Programs, args: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same of an evaluation of a random Llama, whose results must be equal."""
    model = folder / "model"
    files = write_rows(folder, QUICK if args.quick else DOCUMENTS)
    write_definitions(folder, files)
    data = [part for task, file in files.items() for part in ("--task-data", f"{task}={file}")]
    commands: dict[str, list[object]] = {
        "braces": [
            sys.executable, "-m", "braces_cli", "eval", "--tasks", ",".join(files), *data, "--batch-size", BATCH,
            "--device", "cpu", "--format", "json", "--model", model,
        ],
        "lm_eval": [
            sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args", f"pretrained={model}",
            "--device", "cpu", "--tasks", ",".join(f"bench_{task}" for task in files), "--include_path", folder,
            "--batch_size", BATCH, "--output_path", folder / "theirs",
        ],
    }  # fmt: skip
    times = programs.measure(commands, args)
    check_equal(programs.output["braces"], folder / "theirs")
    return compare(programs, times, "eval_vs_lm_eval", "braces", "lm_eval"), medians(times)


def steering(programs: Programs, args: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same of greedy texts for 200 prompts, with a built-in attribute and no adapter."""
    prompts, model = folder / "prompts.txt", args.model[-1]
    words = ("The film", "A day in the old town", "My friend said that the food", "It was", "In the end the story")
    count = 8 if args.quick else PROMPTS
    prompts.write_text("".join(f"{words[i % len(words)]} {i}\n" for i in range(count)), encoding="utf-8")
    script: list[object] = [
        Path(__file__).with_name("_generate.py"), "--model", model, "--prompts", prompts, "--output", folder / "plain",
        "--batch-size", STEER_BATCH, "--tokens", TOKENS, "--dtype", args.dtype,
    ]  # fmt: skip
    commands: dict[str, list[object]] = {
        "steer": [
            sys.executable, "-m", "braces_cli", "steer", "--model", model, "--attribute", "positive", "--s", 1,
            "--prompts", prompts, "--output", folder / "steered", "--overwrite", "--temperature", 0,
            "--max-new-tokens", TOKENS, "--batch-size", STEER_BATCH, "--dtype", args.dtype, "--device", "cpu",
            "--quiet",
        ],
        "generate": [sys.executable, *script],
    }  # fmt: skip
    if args.trl_python and importable(args.trl_python, "repeng"):
        commands["repeng"] = [args.trl_python, *script, "--control"]
    times = programs.measure(commands, args)
    ratios = compare(programs, times, "steer_vs_generate", "steer", "generate")
    if "repeng" in commands:
        ratios |= compare(programs, times, "steer_vs_repeng", "steer", "repeng")
    return ratios, medians(times)


def importable(python: Path, name: str) -> bool:
    """Whether another Python can import a package; what it says where it cannot goes to stderr."""
    return subprocess.run([str(python), "-c", f"import {name}"], stdout=subprocess.DEVNULL).returncode == 0


def installed(python: Path, name: str) -> str | None:
    """Version of a distribution that another Python has, None where it has none."""
    code = f"import importlib.metadata as m; print(m.version({name!r}))"
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, action="append", help="folder; repeatable (default: a random tiny Llama)")
    parser.add_argument("--rows", type=Path, action="append", help="file of training rows; repeatable")
    parser.add_argument("--trl-python", type=Path, help="Python of an environment with trl, and repeng if possible")
    parser.add_argument("--only", choices=KINDS, action="append", help="repeatable (default: all)")
    parser.add_argument("--steps", type=int, help="optimizer steps (default 300, --quick 2)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, help="threads of each process (default: all cores)")
    parser.add_argument("--repeats", type=int, help=f"measurements of each program (default {LEAST_REPEATS})")
    parser.add_argument(
        "--seconds", type=float, default=2 * SECONDS, help=f"of a case; once {LEAST_OF_MINUTES} repeats are done"
    )
    parser.add_argument("--quick", action="store_true", help="tiny, once: shows that it runs, measures nothing")
    args = parser.parse_args()
    args.repeats = args.repeats or (1 if args.quick else LEAST_REPEATS)
    if args.repeats < LEAST_OF_MINUTES and not args.quick:
        parser.error(f"--repeats: fewer than {LEAST_OF_MINUTES} say nothing about spread")
    args.steps = args.steps or (2 if args.quick else 300)
    return args


def main() -> None:
    args = parse()
    ratios: dict[str, Any] = {}
    seconds: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="braces-bench-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        write_model(folder / "model")
        args.model = args.model or [folder / "model"]
        if not args.rows:
            (folder / "made").mkdir()
            args.rows = [folder / "made" / "rows.jsonl"]
            args.rows[0].write_text("".join(f'{{"text": "a day of {i} films"}}\n' for i in range(64)))
        programs = Programs(args.threads)
        for kind, work in zip(KINDS, (training, evaluation, steering), strict=True):
            if args.only is None or kind in args.only:
                found, medians_of = work(programs, args, folder)
                ratios |= found
                seconds[kind] = medians_of
                # Should a later one fail, these took long.
                print(f"{kind}: {json.dumps({'ratios': found, 'seconds': medians_of})}", file=sys.stderr, flush=True)
    trl = {each: args.trl_python and installed(args.trl_python, each) for each in ("trl", "repeng")}
    settings = {
        "steps": args.steps,
        "batch_size": BATCH,
        "dtype": args.dtype,
        "threads": args.threads,
        "rank": {"braces": "default", "lora and trl": RANK},
        "versions": trl,
        "repeats": args.repeats,
        "quick": args.quick,
        "seconds": seconds,
    }
    report(settings, ratios)


if __name__ == "__main__":
    main()
