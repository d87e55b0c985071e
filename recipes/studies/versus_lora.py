"""The forms of relevance against LoRA and its relatives, at equal numbers of trained parameters.

Run     python recipes/studies/versus_lora.py --task sst5-reviews10M --model M --data train.jsonl \\
            --held-out dev.jsonl --out runs.jsonl [--steps 100] [--systems untied-1/4,lora-16] [--seeds 0,1,2]
        python recipes/studies/versus_lora.py --task facts --model embedded --data qa_train.jsonl --epochs 8 \\
            --questions popqa.jsonl --out runs.jsonl
        python recipes/studies/versus_lora.py --report --out runs.jsonl --plot versus_lora.png
Needs   a causal LM that a CPU can train, and rows as `braces train` takes them
Shows   one JSON line a run in --out, which a second call continues; with --report a Markdown table and a picture

Each system is trained on seed 0 at every rate of its own list. The rate with the best score on the validation part of
the held-out rows (every second one) is kept; reported is the score on the other part, at that rate, over all seeds. The
score is the held-out loss; with --questions the share of questions answered rightly by PopQA's rule, or, where rows
have `mc1_targets`, the share whose right choice is the likeliest. All systems see
the same rows in the same order for the same number of steps, without dropout. Budgets are shares of the parameters of
LoRA of rank 16 on the queries and values: each form takes the largest rank that fits.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from _runs import Runs, read, spread, train

from braces_cli.core.models.loading import load_shape, load_tokenizer
from braces_cli.core.models.tokenization import encode
from braces_cli.core.session import Session
from braces_cli.data.examples import Examples
from braces_cli.evaluation.tasks.popqa import contained, possible_answers
from braces_cli.scoring.likelihood import Likelihood, likelihoods
from braces_cli.training.settings import RunSettings
from braces_cli.training.train import count_parameters

BUDGETS = {"1/16": 1 / 16, "1/4": 1 / 4, "1": 1.0}
# Rates tried. Of a form: the rate of the projections times sqrt(width), and that of the gates; of LoRA: peak rates.
FORM_RATES = {
    "paper": [(0.08, 0.3), (0.16, 0.3), (0.32, 0.3), (0.16, 0.1)],
    "signed": [(0.16, 0.1), (0.32, 0.1), (0.64, 0.1), (0.32, 0.3)],
    "untied": [(0.16, 0.1), (0.32, 0.1), (0.64, 0.1), (0.32, 0.3)],
    "whitened": [(0.32, 0.1), (0.64, 0.1), (1.28, 0.1), (0.64, 0.3)],
}
# Signs and names of the two ends of a spread.
_ENDS = ((1, "low"), (-1, "high"))
LORA_RATES = [1e-3, 3e-3, 1e-2, 2e-2]
# In the order in which they are run: what answers the first question comes first.
SYSTEMS: dict[str, dict[str, Any]] = {
    "whitened-1/4": {"relevance": "whitened"},
    "lora-16": {"method": "lora", "rank": 16},
    "untied-1/4": {"relevance": "untied"},
    "signed-1/4": {"relevance": "signed"},
    "lora-4": {"method": "lora", "rank": 4},
    "paper-1/4": {"relevance": "paper"},
    "lora-1": {"method": "lora", "rank": 1},
    "whitened-1/16": {"relevance": "whitened"},
    "whitened-1": {"relevance": "whitened"},
    "dora-4": {"method": "dora", "rank": 4},
    "pissa-4": {"method": "pissa", "rank": 4},
    "lora-down-1/4": {"method": "lora", "lora_targets": ("down_proj",)},
    "untied-1/16": {"relevance": "untied"},
    "untied-1": {"relevance": "untied"},
    "signed-1/16": {"relevance": "signed"},
    "signed-1": {"relevance": "signed"},
    "paper-1/16": {"relevance": "paper"},
    "paper-1": {"relevance": "paper"},
    "lora-down-1/16": {"method": "lora", "lora_targets": ("down_proj",)},
    "lora-down-1": {"method": "lora", "lora_targets": ("down_proj",)},
}


def main() -> None:
    args = parse()
    runs = Runs(args.out)
    if args.report:
        report(runs.done, args.plot)
        return
    tokenizer, shape = load_tokenizer(args.model), load_shape(args.model)
    sets = Rows(args, tokenizer)
    length = {"epochs": args.epochs} if args.epochs else {"max_steps": args.steps}
    base = RunSettings(batch_size=16, max_length=args.max_length, **length)
    budget = count_parameters(shape, replace(base, method="lora", rank=16))["trainable_parameters"]
    seeds = [int(seed) for seed in args.seeds.split(",")]
    for system in args.systems.split(",") if args.systems else SYSTEMS:
        settings = replace(base, **SYSTEMS[system])
        if "rank" not in SYSTEMS[system]:
            settings = replace(settings, rank=largest_rank(shape, settings, budget * budget_of(system)))

        def run(rates: dict[str, float], seed: int, system: str = system, settings: RunSettings = settings) -> Any:
            made = replace(settings, **rates, seed=seed)
            identity = {"task": args.task, "system": system, **rates, "seed": seed}
            return runs.get(identity, lambda: measure(args.model, sets, made))

        best = min(rates_of(settings, shape), key=lambda rates: run(rates, seeds[0])["validation"] * sets.sign)
        for seed in seeds[1:]:
            run(best, seed)


def budget_of(system: str) -> float:
    """The share of LoRA's parameters that the name of a system ends with."""
    return BUDGETS[system.rpartition("-")[2]]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", help="name of this comparison in the results")
    parser.add_argument("--model")
    parser.add_argument("--data", action="append", default=[])
    parser.add_argument("--held-out", action="append", default=[], help="default: every tenth row of --data")
    parser.add_argument(
        "--questions", type=Path, help="rows of PopQA's or TruthfulQA's schema, in place of held-out rows"
    )
    parser.add_argument("--limit", type=int, default=600, help="held-out rows")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--epochs", type=float)
    parser.add_argument("--max-length", type=int, default=192)
    parser.add_argument("--systems", help=f"comma-separated, of {', '.join(SYSTEMS)}; default: all")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--plot", type=Path)
    return parser.parse_args()


class Rows:
    """The rows of a comparison: for training, for choosing rates, for the report.

    `sign` is 1 where less is better, else -1.
    """

    def __init__(self, args: argparse.Namespace, tokenizer: Any) -> None:
        parts = [read(name, tokenizer, args.max_length) for name in args.data]
        items = [item for part in parts for item in part.items]
        self.questions: list[dict[str, Any]] = []
        held: list[Any] = []
        if args.questions:
            self.questions = [json.loads(line) for line in args.questions.read_text("utf-8").splitlines()]
        elif args.held_out:
            held = [item for name in args.held_out for item in read(name, tokenizer, args.max_length).items]
        else:
            held, items = items[::10], [item for index, item in enumerate(items) if index % 10]
        self.training = Examples(items=items)
        self.held_out = held[: args.limit]
        self.sign = -1 if self.questions else 1


def rates_of(settings: RunSettings, shape: Any) -> list[dict[str, float]]:
    """The settings of rates that a system is tried with."""
    if settings.method != "braces":
        return [{"lr": rate} for rate in LORA_RATES]
    root = math.sqrt(shape.config.hidden_size)
    return [{"lr": float(f"{turn / root:.3g}"), "gate_lr": gate} for turn, gate in FORM_RATES[settings.relevance]]


def largest_rank(shape: Any, settings: RunSettings, budget: float) -> int:
    """The largest rank whose parameters fit the budget; at least 1."""
    each = [count_parameters(shape, replace(settings, rank=rank))["trainable_parameters"] for rank in (1, 2)]
    slope = each[1] - each[0]
    return max(1, int((budget - (each[0] - slope)) // slope))


def measure(model: str, rows: Rows, settings: RunSettings) -> dict[str, Any]:
    session, result = train(model, rows.training, None, settings)
    if rows.questions:
        right = choices if "mc1_targets" in rows.questions[0] else answers
        marks = right(session, rows.questions)
        validation, test = (sum(part) / len(part) for part in (marks[::2], marks[1::2]))
    else:
        validation, test = losses(session, rows.held_out)
    return {
        "rank": settings.rank,
        "parameters": result["trainable_parameters"],
        "train_loss": result["train_loss"],
        "seconds": result["seconds"],
        "validation": validation,
        "test": test,
        "less_is_better": rows.sign == 1,
    }


def losses(session: Session, items: list[Any]) -> tuple[float, float]:
    """Mean loss a token over the even rows and over the odd ones."""
    model, pad_id = session.base.model, session.base.tokenizer.pad_token_id
    parts = [sum(likelihoods(model, items[start::2], pad_id, 16), Likelihood()).loss for start in (0, 1)]
    return parts[0], parts[1]


def answers(session: Session, questions: list[dict[str, Any]]) -> list[bool]:
    """Which questions are answered rightly: greedy, 15 tokens."""
    model, tokenizer = session.base.model.eval(), session.base.tokenizer
    right = []
    for row in questions:
        ids = encode(tokenizer, f"Q: {row['question']} A:").ids
        with torch.no_grad():
            out = model.generate(
                torch.tensor([ids]), max_new_tokens=15, do_sample=False, pad_token_id=tokenizer.pad_token_id
            )
        text = tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True).split("\n")[0]
        right.append(contained(text, possible_answers(row)))
    return right


def choices(session: Session, questions: list[dict[str, Any]]) -> list[bool]:
    """Of which questions the right choice has the highest log-likelihood."""
    model, tokenizer = session.base.model, session.base.tokenizer
    right = []
    for row in questions:
        targets = row["mc1_targets"]
        pairs = [encode(tokenizer, f"Q: {row['question']} A:", f" {choice}") for choice in targets["choices"]]
        found = [each.nll for each in likelihoods(model, pairs, tokenizer.pad_token_id, 8)]
        right.append(targets["labels"][found.index(min(found))] == 1)
    return right


def summarise(done: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each task and system: its best rate and the spread of its test scores there."""
    rows = []
    for task, system in dict.fromkeys((run["task"], run["system"]) for run in done):
        runs = [run for run in done if (run["task"], run["system"]) == (task, system)]
        sign = 1 if runs[0]["less_is_better"] else -1
        best = min((run for run in runs if run["seed"] == 0), key=lambda run: sign * run["validation"])
        same = [run for run in runs if (run["lr"], run.get("gate_lr")) == (best["lr"], best.get("gate_lr"))]
        figures = {"task": task, "system": system, "seeds": len(same), "less_is_better": sign == 1}
        rows.append(
            figures
            | {key: best.get(key) for key in ("rank", "parameters", "lr", "gate_lr")}
            | spread(run["test"] for run in same)
        )
    return rows


def report(done: list[dict[str, Any]], plot: Path | None) -> None:
    rows = summarise(done)
    print("| task | system | parameters | score (lowest, highest) | seeds | rates |")
    print("| --- | --- | ---: | ---: | ---: | --- |")
    for row in rows:
        rates = f"{row['lr']:.3g}" + (f", {row['gate_lr']:.2g}" if row.get("gate_lr") else "")
        score = f"{row['mean']:.3f} ({row['low']:.3f}, {row['high']:.3f})"
        print(f"| {row['task']} | {row['system']} | {row['parameters']:,} | {score} | {row['seeds']} | {rates} |")
    if plot is not None:
        draw(rows, plot)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """One panel a task: score over trained parameters, one line a family of systems."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    rows = [row for row in rows if row["seeds"] > 1]  # others are not finished
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    columns = min(3, len(tasks))
    height = -(-len(tasks) // columns)
    sheet = Figure(figsize=(4.6 * columns, 3.4 * height), layout="constrained")
    colours = {
        "whitened": "C0",
        "untied": "C9",
        "signed": "C2",
        "paper": "C4",
        "lora": "C1",
        "lora-down": "C3",
        "dora": "C5",
        "pissa": "C6",
    }
    for place, task in enumerate(tasks):
        axes = sheet.add_subplot(height, columns, place + 1)
        of_task = [row for row in rows if row["task"] == task]
        for family, colour in colours.items():
            points = sorted(
                (r for r in of_task if r["system"].rpartition("-")[0] == family), key=lambda r: r["parameters"]
            )
            if points:
                x = [p["parameters"] for p in points]
                # The mean of equal numbers may lie a rounding beside them.
                bars = [[max(sign * (p["mean"] - p[end]), 0.0) for p in points] for sign, end in _ENDS]
                axes.errorbar(
                    x, [p["mean"] for p in points], yerr=bars, marker="o", capsize=3, color=colour, label=family
                )
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_title(task)
        axes.set_xlabel("trained parameters")
        axes.set_ylabel("held-out loss (less is better)" if of_task[0]["less_is_better"] else "answered rightly")
        axes.grid(alpha=0.3)
    legend(sheet, height, columns, len(tasks))
    sheet.savefig(path, dpi=130)


def legend(sheet: Any, height: int, columns: int, tasks: int) -> None:
    """Name the families, of which a panel need not have all: in a place that no task takes, else in the first panel."""
    named = {
        label: handle for axes in sheet.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    spare = height * columns > tasks
    place = sheet.add_subplot(height, columns, tasks + 1) if spare else sheet.axes[0]
    if spare:
        place.axis("off")
    place.legend(named.values(), named.keys(), loc="center left" if spare else "best", fontsize=10 if spare else 8)


if __name__ == "__main__":
    main()
