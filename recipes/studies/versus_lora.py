"""LLMBraces against LoRA of the same rank on the same rows, steps and seeds: whoever has the lower held-out loss wins.

Run     python recipes/studies/versus_lora.py --model M --out runs.jsonl --steps 150 --name commonsense \\
            --data arc_easy/train.jsonl --data arc_challenge/train.jsonl --data openbookqa/train.jsonl
Needs   a causal LM that a CPU can train, and rows as `braces train` takes them; rows with an `answer` that is the last
        word of their `output` and is one of answer1, answer2, ... in the instruction also give an accuracy
Shows   one JSON line a run in --out, which a second call continues, and at the end one JSON document: each method at
        the best of its rates by held-out loss on the first seed, over all seeds, and accuracy beside chance

A tenth of the rows, drawn with seed 0, is held out. Both methods have rank 16, no dropout, the same schedule and the
same order of rows.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from _runs import Runs, read, spread, train
from scipy.stats import binomtest

from braces_cli.core.models.load_options import LoadOptions
from braces_cli.core.models.loading import load_tokenizer
from braces_cli.core.models.padding import by_length, pad_right
from braces_cli.core.models.tokenization import encode
from braces_cli.core.session import Session, open_session
from braces_cli.data.examples import Examples
from braces_cli.data.readers import Source, read_rows
from braces_cli.data.row_formats import instruction_prompt
from braces_cli.scoring.likelihood import Likelihood, likelihoods
from braces_cli.training.settings import RunSettings

# Peak rates tried. Those of braces are of the projections; the gates have --gate-lr.
RATES = {"lora": (1e-3, 3e-3, 1e-2), "braces": (1e-3, 3e-3, 1e-2)}
RANK = 16


def main() -> None:
    args = parse()
    tokenizer = load_tokenizer(args.model)
    rows = [row for name in args.data for row in read_rows(name)]
    random.Random(0).shuffle(rows)
    held_out, train_rows = rows[: len(rows) // 10], rows[len(rows) // 10 :]
    train_set, test_set = (tokenised(part, tokenizer, args.max_length) for part in (train_rows, held_out))
    base = RunSettings(
        rank=RANK,
        max_steps=args.steps,
        batch_size=args.batch_size,
        max_length=args.max_length,
        gate_lr=args.gate_lr,
        scale=args.scale,
    )
    runs = Runs(args.out)
    common = {"name": args.name, "model": Path(args.model).name, "steps": args.steps}

    def run(method: str, rate: float, seed: int) -> dict[str, Any]:
        settings = replace(base, method=method, lr=rate, seed=seed)
        identity: dict[str, Any] = {**common, "method": method, "lr": rate, "seed": seed}
        if method == "braces":
            identity |= {"gate_lr": args.gate_lr, "scale": args.scale}
        return runs.get(identity, lambda: measure(args.model, train_set, test_set, held_out, settings))

    bare = runs.get({**common, "method": "base"}, lambda: scores(_bare(args.model), test_set, held_out))
    report: dict[str, Any] = {**common, "rows": len(train_rows), "held_out": len(held_out), "base": bare}
    seeds = [int(seed) for seed in args.seeds.split(",")]
    for method, rates in RATES.items():
        if args.only and method != args.only:
            continue
        first = {rate: run(method, rate, seeds[0])["loss"] for rate in rates}
        best = min(first, key=lambda rate: first[rate])
        found = [run(method, best, seed) for seed in seeds]
        report[method] = {
            "lr": best,
            "loss_of_rates": first,
            "loss": spread(one["loss"] for one in found),
            "losses": [one["loss"] for one in found],
            "accuracies": [one["accuracy"] for one in found],
            "parameters": found[0]["parameters"],
        }
    if args.only:
        return  # a call without --only finds all runs done and reports
    report["braces"] |= {"gate_lr": args.gate_lr, "scale": args.scale}
    report["winner"] = min(RATES, key=lambda method: report[method]["loss"]["mean"])
    print(json.dumps(report, indent=2))


def tokenised(rows: list[Source], tokenizer: Any, max_length: int) -> Examples:
    """The rows as `braces train` reads them from a file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_text("".join(json.dumps(row.fields) + "\n" for row in rows), encoding="utf-8")
        return read(str(path), tokenizer, max_length)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", action="append", required=True)
    parser.add_argument("--name", required=True, help="of the rows, in the results")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=192)
    parser.add_argument("--gate-lr", type=float, default=RunSettings().gate_lr)
    parser.add_argument("--scale", default=RunSettings().scale)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--only", choices=list(RATES), help="the runs of one method, so that two calls can share a job")
    return parser.parse_args()


def measure(
    model: str, train_set: Examples, test_set: Examples, held_out: list[Source], settings: RunSettings
) -> dict[str, Any]:
    session, result = train(model, train_set, None, settings)
    figures = {"parameters": result["trainable_parameters"], "train_loss": result["train_loss"]}
    return {**figures, "seconds": result["seconds"], **scores(session, test_set, held_out)}


def _bare(model: str) -> Session:
    return open_session(model, None, LoadOptions(device="cpu", dtype="float32"))


def scores(session: Session, test_set: Examples, held_out: list[Source]) -> dict[str, Any]:
    """Held-out loss, and accuracy with its 95 % interval where the rows have answers to choose from."""
    model, pad_id = session.base.model, session.base.tokenizer.pad_token_id
    loss = sum(likelihoods(model, test_set.items, pad_id, 16), Likelihood()).loss
    return {"loss": loss, "accuracy": accuracy(session, held_out)}


def accuracy(session: Session, rows: list[Source]) -> dict[str, Any] | None:
    """How often the answer of the highest likelihood is the right one; chance is the mean of 1 / choices.

    The choices of a row differ in their last token only, so that one pass over what they share ranks them.
    """
    tokenizer, pad_id = session.base.tokenizer, session.base.tokenizer.pad_token_id
    questions, choices, right = [], [], []
    for row in rows:
        answer, output = row.fields.get("answer"), row.fields.get("output", "")
        if not answer or not output.endswith(answer):
            continue
        prompt = instruction_prompt(row.fields["instruction"], row.fields.get("input") or "")
        names = [name for name in (f"answer{k}" for k in range(1, 6)) if f"{name}: ".capitalize() in prompt]
        if answer not in names:
            continue
        ids = [encode(tokenizer, prompt + output.removesuffix(answer) + name).ids for name in names]
        assert len({tuple(each[:-1]) for each in ids}) == 1, "choices differ in more than their last token"
        questions.append(encode(tokenizer, prompt + output.removesuffix(answer) + names[0]))
        choices.append([each[-1] for each in ids])
        right.append(names.index(answer))
    if not questions:
        return None
    hits = 0
    session.base.model.eval()
    for group in by_length(questions, 16):
        batch = pad_right([questions[i] for i in group], pad_id)
        with torch.no_grad():
            logits = session.base.model(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
            ).logits
        for place, index in enumerate(group):
            last = len(questions[index].ids) - 2  # what comes before the token that tells the choices apart
            hits += int(logits[place, last, choices[index]].argmax()) == right[index]
    interval = binomtest(hits, len(questions)).proportion_ci(method="wilson")
    return {
        "value": hits / len(questions),
        "low": interval.low,
        "high": interval.high,
        "chance": sum(1 / len(each) for each in choices) / len(choices),
        "n": len(questions),
    }


if __name__ == "__main__":
    main()
