"""Which settings and rates reach the lowest held-out loss at equal steps?

Run     python recipes/studies/defaults.py --model M --data train.jsonl --eval-data dev.jsonl --out runs.jsonl \\
            --grid relevance=paper,untied --grid gate_lr=0.1 --steps 150 --seeds 0,1,2
Needs   a causal LM that a CPU can train, and rows as `braces train` takes them; one run per point and seed
Shows   one JSON line a run in --out, which a second call continues, and a table of all its points, best first
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any, get_type_hints

from _runs import Runs, read, spread, train

from braces_cli.core.models.loading import load_tokenizer
from braces_cli.training.settings import RunSettings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--eval-data", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--grid", action="append", default=[], help="setting=value,value; the product is run")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--max-length", type=int, default=256)
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.model)
    rows, held_out = (read(name, tokenizer, args.max_length) for name in (args.data, args.eval_data))
    runs = Runs(args.out)
    name = Path(args.model).name
    for point in points(args.grid):
        for seed in map(int, args.seeds.split(",")):
            settings = RunSettings(**point, seed=seed, max_steps=args.steps, max_length=args.max_length)
            identity = {"model": name, "steps": args.steps, "seed": seed, **point}
            runs.get(identity, lambda settings=settings: measure(args.model, rows, held_out, settings))  # type: ignore[misc]
    show(runs.done)


def points(grid: list[str]) -> list[dict[str, Any]]:
    """Every combination of the values of `--grid`, each of its setting's own type."""
    kinds = get_type_hints(RunSettings)
    axes = []
    for text in grid:
        setting, _, values = text.partition("=")
        kind = kinds[setting] if kinds[setting] in (str, int) else float
        axes.append([(setting, kind(value)) for value in values.split(",")])
    return [dict(point) for point in itertools.product(*axes)]


def measure(model: str, rows: Any, held_out: Any, settings: RunSettings) -> dict[str, Any]:
    _, result = train(model, rows, held_out, settings)
    names = ("base_eval_loss", "eval_loss", "train_loss", "seconds", "token_path_share")
    return {name: result[name] for name in names}


def show(done: list[dict[str, Any]]) -> None:
    """Held-out loss of every point: mean and range over seeds."""
    measured = ("base_eval_loss", "eval_loss", "train_loss", "seconds", "token_path_share", "seed")
    groups: dict[tuple, list[float]] = {}
    for run in done:
        point = tuple(sorted((key, value) for key, value in run.items() if key not in measured))
        groups.setdefault(point, []).append(run["eval_loss"])
    for point, losses in sorted(groups.items(), key=lambda item: (dict(item[0])["model"], sum(item[1]) / len(item[1]))):
        found = spread(losses)
        words = " ".join(f"{key}={value}" for key, value in point)
        print(f"{found['mean']:.4f} [{found['low']:.4f}, {found['high']:.4f}] n={len(losses)}  {words}")


if __name__ == "__main__":
    main()
