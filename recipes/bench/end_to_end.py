"""Complete commands against the programs they replace: time from start to exit, and peak memory.

    train_vs_trl       braces train / trl sft --use_peft: same rows, steps, batch, dtype, rank and target modules
    train_vs_lora      braces train / braces train --method lora
    eval_vs_lm_eval    braces eval of a base / lm_eval --model hf, on the same rows, with equal scores
    adapters_vs_runs   braces eval of three adapters / three times braces eval of the base
    steer_vs_generate  braces steer --attribute / transformers' generate without steering
    steer_vs_repeng    the same / generate with a control vector of repeng

Each is also a ratio of peak memory, `NAME, memory`. trl and repeng are measured if --trl-python names a Python that has
them, in a separate environment (pip install trl peft repeng). Mixed precision and gradient checkpointing, defaults of
trl, are turned off, as braces does neither by default.

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

from common import LEAST_OF_MINUTES, LEAST_REPEATS, interleave, medians, parse, ratio, report

RANK, BATCH, ADAPTERS = 16, 16, 3
TARGETS = {
    "train_vs_trl": 0.35, "train_vs_trl, memory": 0.8, "eval_vs_lm_eval": 0.8, "adapters_vs_runs": 1.0,
    "steer_vs_generate": 1.02,
}  # fmt: skip
PROMPTS, TOKENS, STEER_BATCH = 200, 20, 8
# Documents of each task: seven repeats take less than four minutes on two cores.
DOCUMENTS, QUICK = {"piqa": 100, "nq_open": 4}, {"piqa": 4, "nq_open": 1}
BRACES = (sys.executable, "-m", "braces_cli")


class Programs:
    """Processes that are measured in turns: seconds, and the peak of resident memory."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._env = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        if args.threads:
            self._env["OMP_NUM_THREADS"] = str(args.threads)
        self.output: dict[str, str] = {}
        self.peaks: dict[str, list[float]] = {}
        self.times: dict[str, list[float]] = {}

    def measurement(self, name: str, argv: Sequence[object]) -> Callable[[], float]:
        """Return a run of `argv`, whose standard output is stored in `output`."""

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

    def measure(self, commands: Mapping[str, Sequence[object]]) -> None:
        """Run the commands in turns; the results are in `times` and `peaks`."""
        work = {name: self.measurement(name, argv) for name, argv in commands.items()}
        # No warm-up: it would take as long as a repeat, and the median ignores one slow run.
        self.times = interleave(work, self._args.repeats, self._args.seconds, warmup=0, least=LEAST_OF_MINUTES)
        self.peaks = {name: self.peaks[name][-len(self.times[name]) :] for name in commands}

    def compare(self, name: str, ours: str, theirs: str, case: str = "", runs: int = 1) -> dict[str, Any]:
        """Return the ratios of two programs, in time and in memory; `runs` of the other replace one of ours."""
        found = {}
        for kind, figures, factor in ((name, self.times, runs), (f"{name}, memory", self.peaks, 1)):
            below = [factor * figure for figure in figures[theirs]]
            found[f"{kind}, {case}" if case else kind] = ratio(figures[ours], below, TARGETS.get(kind))
        return found


def training_rows(source: Path, folder: Path, most: int) -> Path:
    """Write `train.jsonl` with rows that both programs read, {text} or {prompt, completion}; return its folder."""
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
    """Return ratios and median seconds of training, for every model and set of rows."""
    ratios: dict[str, Any] = {}
    seconds: dict[str, Any] = {}
    for source in args.rows:
        rows = training_rows(source, folder, 64 if args.quick else 1_000_000)
        for model in args.model:
            case = f"{model.name}, {source.parent.name}"
            ours: list[object] = [
                *BRACES, "train", "--model", model, "--data", rows / "train.jsonl", "--max-steps", args.steps,
                "--batch-size", BATCH, "--dtype", args.dtype, "--device", "cpu", "--save-steps", 0, "--overwrite",
                "--rank", RANK, "--format", "json", "--quiet", "--output-dir",
            ]  # fmt: skip
            commands = {
                "braces": [*ours, folder / "out-braces"],
                "lora": [*ours, folder / "out-lora", "--method", "lora"],
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
            programs.measure(commands)
            seconds |= {f"{name}, {case}": value for name, value in medians(programs.times).items()}
            if args.trl_python:
                ratios |= programs.compare("train_vs_trl", "braces", "trl", case)
            ratios |= programs.compare("train_vs_lora", "braces", "lora", case)
    return ratios, seconds


def write_model(folder: Path) -> None:
    """Write a random Llama with a byte-level tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: place for place, token in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=1024, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def write_tasks(folder: Path, documents: dict[str, int]) -> dict[str, Path]:
    """Write rows for two tasks in their own schema, and definitions of the tasks on these rows for lm-eval."""
    import lm_eval

    rows: dict[str, list[dict[str, Any]]] = {
        "piqa": [
            {"goal": f"To move {i} boxes upstairs", "sol1": "carry each of them" + " slowly" * (i % 3),
             "sol2": f"carry {i} at once", "label": i % 2} for i in range(documents["piqa"])
        ],
        "nq_open": [
            {"question": f"how many boxes are {i} and {i}", "answer": [str(2 * i)]} for i in range(documents["nq_open"])
        ],
    }  # fmt: skip
    files = {}
    for name, listed in rows.items():
        files[name] = folder / f"{name}.jsonl"
        files[name].write_text("".join(json.dumps(row) + "\n" for row in listed), encoding="utf-8")
        source = Path(lm_eval.__file__).parent / "tasks" / name / f"{name}.yaml"
        splits = dict.fromkeys(("train", "validation"), str(files[name]))
        data = {"data_files": splits, "cache_dir": str(folder / "cache")}
        lines = [
            f"include: {source}", f"task: bench_{name}", "dataset_path: json", "dataset_name: null",
            f"dataset_kwargs: {json.dumps(data)}",
        ]  # fmt: skip
        (folder / f"bench_{name}.yaml").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return files


def check_equal(printed: str, folder: Path) -> None:
    """Compare the scores of both programs, so that a program cannot be fast by doing less."""
    theirs = json.loads(next(folder.rglob("results*.json")).read_text(encoding="utf-8"))["results"]
    for task, metrics in json.loads(printed)["systems"][0]["results"].items():
        for metric, entry in metrics.items():
            found = [value for key, value in theirs[f"bench_{task}"].items() if key.partition(",")[0] == metric]
            # Such as `empty`, which lm-eval does not have.
            if found and not any(abs(entry["value"] - value) < 1e-9 for value in found):
                sys.exit(f"{task} {metric}: {entry['value']} by braces, {found} by lm-eval")


def evaluation(programs: Programs, args: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return ratios and median seconds of an evaluation of a random Llama."""
    model = folder / "model"
    files = write_tasks(folder, QUICK if args.quick else DOCUMENTS)
    adapters: list[object] = []
    for seed in range(ADAPTERS):
        adapters += ["--adapter", folder / f"adapter{seed}"]
        words = ["train", "--model", model, "--data", args.rows[0], "--max-steps", 1, "--seed", seed]
        programs.measurement(f"adapter {seed}", [*BRACES, *words, "--quiet", "--output-dir", adapters[-1]])()
    data = [part for task, file in files.items() for part in ("--task-data", f"{task}={file}")]
    ours: list[object] = [
        *BRACES, "eval", "--tasks", ",".join(files), *data, "--batch-size", BATCH, "--device", "cpu", "--model", model,
        "--format", "json",
    ]  # fmt: skip
    theirs: list[object] = [
        sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args", f"pretrained={model}",
        "--device", "cpu", "--tasks", ",".join(f"bench_{task}" for task in files), "--include_path", folder,
        "--batch_size", BATCH, "--output_path", folder / "theirs",
    ]  # fmt: skip
    programs.measure({"braces": ours, "lm_eval": theirs, "adapters": [*ours, *adapters, "--no-base"]})
    check_equal(programs.output["braces"], folder / "theirs")
    ratios = programs.compare("eval_vs_lm_eval", "braces", "lm_eval")
    ratios |= programs.compare("adapters_vs_runs", "adapters", "braces", runs=ADAPTERS)
    return ratios, medians(programs.times)


def steering(programs: Programs, args: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return ratios and median seconds of greedy texts for 200 prompts, with a built-in attribute and no adapter."""
    prompts, model = folder / "prompts.txt", args.model[-1]
    words = ("The film", "A day in the old town", "My friend said that the food", "It was", "In the end the story")
    count = 8 if args.quick else PROMPTS
    prompts.write_text("".join(f"{words[i % len(words)]} {i}\n" for i in range(count)), encoding="utf-8")
    script: list[object] = [__file__, "generate", model, prompts, folder / "plain", args.dtype]
    commands: dict[str, list[object]] = {
        "steer": [
            *BRACES, "steer", "--model", model, "--attribute", "positive", "--s", 1, "--prompts", prompts, "--output",
            folder / "steered", "--overwrite", "--temperature", 0, "--max-new-tokens", TOKENS, "--batch-size",
            STEER_BATCH, "--dtype", args.dtype, "--device", "cpu", "--quiet",
        ],
        "generate": [sys.executable, *script],
    }  # fmt: skip
    if args.trl_python and installed(args.trl_python, "repeng"):
        commands["repeng"] = [args.trl_python, *script, "control"]
    programs.measure(commands)
    ratios = programs.compare("steer_vs_generate", "steer", "generate")
    if "repeng" in commands:
        ratios |= programs.compare("steer_vs_repeng", "steer", "repeng")
    return ratios, medians(programs.times)


def generate(name: str, prompts: str, output: str, dtype: str, control: str = "") -> None:
    """Generate texts with transformers alone, and with a random control vector of repeng on request."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, dtype)).eval()
    if control:
        from repeng import ControlModel

        layers, width = list(range(model.config.num_hidden_layers)), model.config.hidden_size
        model = ControlModel(model, layers)
        generator = torch.Generator().manual_seed(0)
        vectors = {each: (1e-3 * torch.randn(width, generator=generator)).to(model.dtype) for each in layers}
        model.set_raw_control(vectors)
    rows = Path(prompts).read_text(encoding="utf-8").splitlines()
    with Path(output).open("w", encoding="utf-8") as file, torch.no_grad():
        for start in range(0, len(rows), STEER_BATCH):
            batch = rows[start : start + STEER_BATCH]
            inputs = tokenizer(batch, return_tensors="pt", padding=True)
            inputs.pop("token_type_ids", None)
            found = model.generate(
                **inputs, max_new_tokens=TOKENS, do_sample=False, pad_token_id=tokenizer.pad_token_id
            )
            new = tokenizer.batch_decode(found[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            for prompt, text in zip(batch, new, strict=True):
                file.write(json.dumps({"prompt": prompt, "text": text}) + "\n")


def installed(python: Path, name: str) -> str | None:
    """Return the version of a distribution of another Python, None if it is missing or cannot be imported."""
    code = f"import {name}, importlib.metadata as m; print(m.version({name!r}))"
    done = subprocess.run([str(python), "-c", code], stdout=subprocess.PIPE, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, action="append", help="folder; repeatable (default: a random tiny Llama)")
    parser.add_argument("--rows", type=Path, action="append", help="file of training rows; repeatable")
    parser.add_argument("--trl-python", type=Path, help="Python of an environment with trl, and repeng if possible")
    parser.add_argument("--only", choices=KINDS, action="append", help="repeatable (default: all)")
    parser.add_argument("--steps", type=int, help="optimizer steps (default 300, --quick 2)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])


KINDS = {"train": training, "eval": evaluation, "steer": steering}


def main() -> None:
    if sys.argv[1:2] == ["generate"]:
        generate(*sys.argv[2:])
        return
    args = parse(__doc__, None, LEAST_REPEATS, options, least=LEAST_OF_MINUTES)
    args.steps = args.steps or (2 if args.quick else 300)
    ratios: dict[str, Any] = {}
    seconds: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="braces-bench-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        write_model(folder / "model")
        args.model = args.model or [folder / "model"]
        if not args.rows:
            (folder / "texts").mkdir()
            args.rows = [folder / "texts" / "rows.jsonl"]
            args.rows[0].write_text("".join(f'{{"text": "a day of {i} films"}}\n' for i in range(64)))
        programs = Programs(args)
        for kind in args.only or KINDS:
            found, seconds[kind] = KINDS[kind](programs, args, folder)
            ratios |= found
            # A later failure must not lose these figures.
            print(f"{kind}: {json.dumps({'ratios': found, 'seconds': seconds[kind]})}", file=sys.stderr, flush=True)
    settings = {
        "steps": args.steps, "batch_size": BATCH, "dtype": args.dtype, "threads": args.threads, "rank": RANK,
        "versions": {each: args.trl_python and installed(args.trl_python, each) for each in ("trl", "repeng")},
        "repeats": args.repeats, "quick": args.quick, "seconds": seconds,
    }  # fmt: skip
    report(settings, ratios)


if __name__ == "__main__":
    main()
