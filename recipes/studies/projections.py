"""Cholesky, or torch's orthogonal parametrisation? Held-out loss at equal steps, and the time of one projection.

Run     python recipes/studies/projections.py --model M --data train.jsonl --eval-data dev.jsonl --out runs.jsonl
Needs   a small causal LM (torch's maps build a d x d matrix in every step), and rows as `braces train` takes them
Shows   one JSON line a run in --out, which a second call continues; then milliseconds of one projection, forward and
        backward, at the width of --width

The start is the same projection for all: torch's maps turn it by exp(S) or by the Cayley transform of S, S skew.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from _runs import Runs, read, train
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal

import braces_cli.core.method.adapter
from braces_cli.core.method.projections import orthonormal_rows
from braces_cli.core.method.relevance import RelevanceModule
from braces_cli.core.models.loading import load_tokenizer
from braces_cli.training.settings import RunSettings

MAPS = ("matrix_exp", "cayley", "householder")


def holder(start: Tensor, kind: str) -> Any:
    """A linear layer whose weight is `start` (d_r, d), parametrised by torch."""
    layer = nn.Linear(start.shape[1], start.shape[0], bias=False)
    layer.weight = nn.Parameter(start.clone())
    # Householder vectors know no trivialisation: they start at a projection of their own.
    return orthogonal(layer, orthogonal_map=kind, use_trivialization=kind != "householder")


def module_of(kind: str) -> type[RelevanceModule]:
    """A RelevanceModule whose `weight` is what torch's map is fed with."""

    class Turned(RelevanceModule):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            # In a tuple: no child, or the parameter would be counted twice.
            self._holder = (holder(self.weight.detach(), kind),)
            self.weight = self._holder[0].parametrizations.weight.original

        def projection(self) -> Tensor:
            if not self._learns() and self._exact == self.weight._version:
                return self.weight
            return self._holder[0].weight

        def materialise(self) -> Tensor:
            with torch.no_grad():
                if self._exact != self.weight._version:
                    self.weight.copy_(orthonormal_rows(self.projection().double()))
                    self.set_exact()
            return self.weight.detach()

    return Turned


def milliseconds(make: Any, repeats: int = 5) -> float:
    """Median time of one projection, forward and backward."""
    times = []
    for _ in range(repeats):
        before = time.perf_counter()
        make().square().sum().backward()
        times.append(time.perf_counter() - before)
    return 1000 * sorted(times)[repeats // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--eval-data", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--width", type=int, default=1536)
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.model)
    rows, held_out = (read(name, tokenizer, args.max_length) for name in (args.data, args.eval_data))
    runs, plain = Runs(args.out), RelevanceModule
    for kind in ("cholesky", *MAPS[:2]):
        for seed in map(int, args.seeds.split(",")):

            def work(kind: str = kind, seed: int = seed) -> dict[str, Any]:
                settings = RunSettings(seed=seed, max_steps=args.steps, max_length=args.max_length)
                braces_cli.core.method.adapter.RelevanceModule = plain if kind == "cholesky" else module_of(kind)  # type: ignore[misc]
                _, result = train(args.model, rows, held_out, settings)
                return {name: result[name] for name in ("eval_loss", "train_loss", "seconds")}

            runs.get({"model": Path(args.model).name, "steps": args.steps, "projection": kind, "seed": seed}, work)
    start = RelevanceModule(16, args.width).weight.detach()
    weight = start.clone().requires_grad_()
    print(f"cholesky {milliseconds(lambda: orthonormal_rows(weight)):.1f} ms at {args.width}")
    for kind in MAPS:
        layer = holder(start, kind)
        print(f"{kind} {milliseconds(lambda layer=layer: layer.weight):.1f} ms at {args.width}")  # type: ignore[misc]


if __name__ == "__main__":
    main()
