"""Build the embedded model and its task sets from the texts of this folder.

    python recipes/embedded/build.py --output-dir FOLDER

writes FOLDER/embedded and FOLDER/embedded_tasks; with `braces_cli/assets` as FOLDER they are replaced. The same seed
gives the same texts. The weights differ slightly between machines, because sums of floating-point numbers do.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads are slow on a shared processor
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from card import model_card
from corpus import Corpus
from measure import measure, samples
from shipped import write_shipped
from tokens import train_tokenizer
from training import WINDOW, new_model, train, windows
from world import make_world

VERSION = "1"
SIZES = {
    "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 4,
}  # fmt: skip
VOCABULARY = 2048
BATCH = 8
STEPS = 2400
LIMIT = 5_000_000  # bytes of weights in the package


def build(folder: Path, seed: int, steps: int, say: Any) -> dict[str, Any]:
    """Build texts, tokenizer, weights and figures; return the content of `embedded.json`."""
    started = time.perf_counter()
    model_folder = folder / "embedded"
    model_folder.mkdir(parents=True, exist_ok=True)
    world = make_world()
    write_shipped(world, seed, folder / "embedded_tasks")
    tokenizer = train_tokenizer(islice(Corpus(world, seed + 1), 40_000), VOCABULARY, model_folder)
    say(f"tokenizer trained, {len(world.facts)} facts, {len(world.beliefs)} beliefs")
    data = windows(Corpus(world, seed + 2), tokenizer, steps * BATCH, seed)
    model = new_model(tokenizer, SIZES, seed)
    parameters = sum(p.numel() for p in model.parameters())
    say(f"{parameters:,} parameters, {data.size:,} tokens to train on")
    train(
        model, data, batch_size=BATCH,
        log=lambda step, loss, rate: say(f"step {step}/{steps}: loss {loss:.3f}, {rate:,.0f} tokens/s"),
    )  # fmt: skip
    model.to(torch.bfloat16).save_pretrained(model_folder)
    assert (model_folder / "model.safetensors").stat().st_size <= LIMIT
    about = {"version": VERSION, "seed": seed, "steps": steps, "tokens": data.size, "parameters": parameters}
    about |= {"window": WINDOW, "training_seconds": round(time.perf_counter() - started)}
    about |= measure(model_folder, folder / "embedded_tasks" / "held_out.jsonl", world)
    (model_folder / "embedded.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    (model_folder / "README.md").write_text(model_card(about, samples(model_folder)), encoding="utf-8")
    return about


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of {BATCH} windows of {WINDOW} tokens")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    started = time.perf_counter()

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - started:6.0f} s] {text}", file=sys.stderr, flush=True)

    print(json.dumps(build(args.output_dir, args.seed, args.steps, say), indent=2))


if __name__ == "__main__":
    main()
