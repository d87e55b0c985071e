"""The commands that `kill_and_resume.py` kills."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path


@dataclass(frozen=True)
class Case:
    """One command.

    Attributes:
        words: of the command line; outputs are relative to the working folder, inputs absolute.
        other: further words of a second writer, which change what it writes.
    """

    words: tuple[str, ...]
    other: tuple[str, ...] = ()


def cases(inputs: dict[str, Path], model: str | None) -> dict[str, Case]:
    """The commands by name."""
    base = ("--model", model) if model else ()
    rows, texts, adapter = (str(inputs[name]) for name in ("rows", "texts", "adapter"))
    slots = str(inputs["adapter"].with_name("slots"))
    seed = ("--seed", "1")
    train = (
        "train", *base, "--max-steps", "12", "--batch-size", "2", "--gradient-accumulation", "2", "--lr", "0.01",
        "--logging-steps", "2", "--save-steps", "2", "--eval-data", texts, "--output-dir", "out", "--resume", "--quiet",
    )  # fmt: skip
    moods = ("--attribute-field", "mood", "--opposites", "positive:negative")
    found = {
        "train": Case((*train, "--data", rows), seed),
        "train texts": Case((*train, "--data", texts), seed),
        "train streamed": Case((*train, "--data", texts, "--streaming"), seed),
        "train attributes": Case((*train, "--data", texts, *moods), seed),
        "train lora": Case((*train, "--data", texts, "--method", "lora"), seed),
        "eval": Case(
            ("eval", *base, "--adapter", adapter, "--tasks", "embedded_popqa,perplexity", "--limit", "6", "--task-data",
             f"perplexity={texts}", "--log-samples", "--output-dir", "out", "--resume", "--quiet"),
            seed,
        ),
        "steer": Case(
            ("steer", *base, "--prompts", str(inputs["prompts"]), "--num-samples", "4", "--batch-size", "2",
             "--max-new-tokens", "12", "--attribute", "sad", "--s", "2", "--attributes", str(inputs["attributes"]),
             "--output", "out.jsonl", "--resume", "--quiet"),
            seed,
        ),
        "attr-build": Case(("attr-build", *base, "--attribute", "joyful", "--output-dir", "out", "--overwrite")),
        "merge": Case(("merge", "--adapter", adapter, "--output-dir", "out", "--overwrite", "--quiet")),
        "export slots": Case(("export", "slots", *base, "--output-dir", "out", "--overwrite", "--quiet")),
        "export lora": Case(
            ("export", "lora", "--base", slots, "--adapter", adapter, "--output-dir", "out", "--gguf",
             "out/adapter.gguf", "--overwrite", "--quiet")
        ),
        "export code": Case(("export", "code", "--adapter", adapter, "--output-dir", "out", "--overwrite", "--quiet")),
        "export control-vector": Case(
            ("export", "control-vector", *base, "--attribute", "sad", "--attributes", str(inputs["attributes"]),
             "--layers", "1-", "--output", "out.gguf", "--overwrite", "--quiet")
        ),
        "inspect report": Case(
            ("inspect", "report", "--adapter", adapter, "--output", "out.html", "--overwrite", "--quiet")
        ),
        "inspect values": Case(("inspect", "values", *base, "--output", "out.parquet", "--overwrite", "--quiet")),
    }  # fmt: skip
    needed = (
        ("train lora", "peft"), ("export lora", "peft"), ("export lora", "gguf"), ("export control-vector", "gguf"),
        ("inspect values", "pyarrow"),
    )  # fmt: skip
    for name, package in needed:
        if name in found and find_spec(package) is None:
            print(f"{name} is left out: there is no {package}", file=sys.stderr)
            del found[name]
    return found
