"""Run tests, benchmarks and commands on a GPU and print one JSON document; see check.sh.

Each part is a separate process with `seconds`, `exit_code`, the peak of GPU memory that nvidia-smi reports, and its
output: the document of a benchmark, the result of a command, the last line of the tests.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "recipes" / "bench"
# Those that take --device; the others measure whole processes on the CPU.
BENCHMARKS = ("training", "forward", "steering", "inspection", "scaling")
SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 512},
    "1.5B": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
             "num_key_value_heads": 2, "vocab_size": 151_936},
    "8B": {"hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128_256},
}  # fmt: skip
PARTS = ("tests", "benchmarks", "commands")


def write_base(folder: Path, size: str) -> None:
    """Write a Llama with random bfloat16 weights and a byte-level tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = LlamaConfig(**SHAPES[size], max_position_embeddings=4096, bos_token_id=0, eos_token_id=0)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(["<s>", *alphabet])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>").save_pretrained(folder)


def write_rows(folder: Path) -> tuple[Path, Path]:
    """Write training rows with attributes, and prompts."""
    rows, prompts = folder / "rows.jsonl", folder / "prompts.txt"
    words = [("good", "positive"), ("sad", "negative"), ("old", "neutral")]
    lines = [
        {"text": f"A {word} film about day {i} in a town.", "attribute": name}
        for i in range(32)
        for word, name in words
    ]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    prompts.write_text("".join(f"The film of day {i}\n" for i in range(16)), encoding="utf-8")
    return rows, prompts


def commands(base: Path, work: Path, device: str, quick: bool) -> Iterator[tuple[str, list[object]]]:
    """Yield name and words of each command; later commands use outputs of earlier ones."""
    rows, prompts = write_rows(work)
    where = ["--device", device, "--quiet"]
    steps, tokens = (2, 4) if quick else (20, 32)
    train = ["train", "--model", base, "--data", rows, "--max-steps", steps, "--format", "json", *where]
    adapter = work / "adapter"
    yield "train", [*train, "--batch-size", 4, "--output-dir", adapter]
    yield "train with attributes", [
        *train, "--batch-size", 4, "--attribute-field", "attribute", "--opposites", "positive:negative",
        "--output-dir", work / "steerable",
    ]  # fmt: skip
    yield "train, gradient checkpointing", [
        *train, "--batch-size", 4, "--gradient-checkpointing", "--output-dir", work / "checkpointed",
    ]  # fmt: skip
    yield "eval", [
        "eval", "--adapter", adapter, "--tasks", "perplexity", "--task-data", f"perplexity={rows}", "--limit", 16,
        "--format", "json", *where,
    ]  # fmt: skip
    yield "steer", [
        "steer", "--adapter", work / "steerable", "--attribute", "positive", "--s", 2, "--prompts", prompts,
        "--output", work / "texts.jsonl", "--max-new-tokens", tokens, "--format", "json", *where,
    ]  # fmt: skip
    yield "merge", ["merge", "--adapter", adapter, "--output-dir", work / "merged", "--format", "json", *where]
    yield "maps", [
        "inspect", "values", "--model", base, "--layers", "0-1", "--output", work / "map.parquet", "--format", "json",
        *where,
    ]  # fmt: skip


class GpuMemory(threading.Thread):
    """Peak of GPU memory while the thread runs, in bytes by nvidia-smi; None without nvidia-smi."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak: int | None = None
        self._done = threading.Event()

    def run(self) -> None:
        while shutil.which("nvidia-smi") and not self._done.wait(0.2):
            asked = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
            shown = subprocess.run(asked, capture_output=True, text=True).stdout.split()
            used = [int(number) * 2**20 for number in shown if number.isdigit()]
            self.peak = max([*used, self.peak or 0])

    def stop(self) -> None:
        self._done.set()
        self.join()


def run(argv: Sequence[object]) -> dict[str, Any]:
    """Run a Python process in the repository."""
    memory = GpuMemory()
    memory.start()
    start = time.perf_counter()
    done = subprocess.run([sys.executable, *map(str, argv)], capture_output=True, text=True, cwd=ROOT)
    seconds = time.perf_counter() - start
    memory.stop()
    found: dict[str, Any] = {"seconds": round(seconds, 2), "exit_code": done.returncode, "gpu_memory": memory.peak}
    try:
        found["result"] = json.loads(done.stdout)
    except ValueError:
        found["result"] = (done.stdout.strip().splitlines() or [""])[-1]
    if done.returncode:
        found["error"] = done.stderr[-2000:]
    return found


def check(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Return the requested parts by name."""
    parts: dict[str, Any] = {}
    quick = args.device == "cpu"
    if "tests" in args.part:
        # On a CPU one test is enough, as the gate runs all of them.
        chosen = ["tests/core/adapter/test_gram.py", "-k", "gram"] if quick else ["-m", ""]
        parts["tests"] = run(["-m", "pytest", "-q", "-n", "0", "--device", args.device, *chosen])
    if "benchmarks" in args.part:
        for name in BENCHMARKS:
            parts[f"benchmark {name}"] = run(
                [BENCH / f"{name}.py", "--device", args.device, *(["--quick"] if quick else [])]
            )
    if "commands" in args.part:
        for size in args.size:
            folder = work / size
            folder.mkdir(parents=True)
            write_base(folder / "base", size)
            for name, words in commands(folder / "base", folder, args.device, quick):
                parts[f"{name}, {size}"] = run(["-m", "braces_cli", *words])
            shutil.rmtree(folder)
    return parts


def parse() -> argparse.Namespace:
    import torch

    there = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default=there, help=f"default here: {there}")
    parser.add_argument("--part", choices=PARTS, action="append", help="repeatable (default: all)")
    parser.add_argument(
        "--size", choices=SHAPES, action="append", help="repeatable (default: 1.5B and 8B; tiny on a CPU)"
    )
    parser.add_argument("--work", type=Path, help="folder for checkpoints (default: a temporary one)")
    parser.add_argument("--output", type=Path, help="write the document there (default: standard output)")
    args = parser.parse_args()
    args.part = args.part or list(PARTS)
    args.size = args.size or (["tiny"] if args.device == "cpu" else ["1.5B", "8B"])
    return args


def main() -> None:
    args = parse()
    sys.path.insert(0, str(BENCH))
    from common import machine

    with tempfile.TemporaryDirectory(prefix="braces-gpu-", dir=args.work, ignore_cleanup_errors=True) as name:
        parts = check(args, Path(name))
    failed = [name for name, part in parts.items() if part["exit_code"]]
    text = json.dumps({"machine": machine(args.device), "parts": parts, "failed": failed}, indent=2)
    if args.output is None:
        print(text)
    else:
        args.output.write_text(text + "\n", encoding="utf-8")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
