"""Build the embedded model from nothing but this folder: `python recipes/embedded/build.py --output-dir FOLDER`."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from itertools import islice
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads are slow where the processor is shared

import torch
from corpus import Corpus
from tokens import train_tokenizer
from training import new_model, train, windows
from world import make_world

SIZES = {
    "hidden_size": 160, "intermediate_size": 448, "num_hidden_layers": 6, "num_attention_heads": 5,
    "num_key_value_heads": 5,
}  # fmt: skip
VOCABULARY = 2048
BATCH = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2200)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    folder = args.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - started:6.0f} s] {text}", file=sys.stderr, flush=True)

    world = make_world()
    say(f"{len(world.facts)} facts, {len(world.beliefs)} beliefs")
    tokenizer = train_tokenizer(islice(Corpus(world, args.seed + 1), 40_000), VOCABULARY, folder)
    say("tokenizer trained")
    data = windows(Corpus(world, args.seed + 2), tokenizer, args.steps * BATCH, args.seed)
    say(f"{data.size:,} tokens to train on")
    model = new_model(tokenizer, SIZES, args.seed)
    say(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    train(
        model, data, batch_size=BATCH, lr=args.lr, warmup=100,
        log=lambda step, steps, loss, rate: say(f"step {step}/{steps}: loss {loss:.3f}, {rate:,.0f} tokens/s"),
    )  # fmt: skip
    model.to(torch.bfloat16).save_pretrained(folder)
    say("saved")
    (folder / "build.json").write_text(json.dumps({"seed": args.seed, "steps": args.steps}) + "\n")


if __name__ == "__main__":
    main()
