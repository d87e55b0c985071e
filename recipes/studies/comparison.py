"""Comparison of braces with PEFT methods on five tasks, each system at the best rate of its own search.

Run     python recipes/studies/comparison.py --model SMOLLM2 --out runs.jsonl
        python recipes/studies/comparison.py --out runs.jsonl --table
Needs   a causal LM, and the data folder (sst5, triviaqa, commonsense/boolq, popqa, truthfulqa)
Shows   one JSON line per run in --out, continued by a second call, and Markdown tables of these lines

Rates   The loss on validation rows after a short run, on a grid of factor 2 around the start rate. The grid is extended
        while its best rate is at its border. The rate of the gates is the default.
Report  The chosen rate with three seeds, on other rows.
Systems All systems are measured on sst5-text, those of `SELECTED` on the other tasks; of the two largest adapters of
        braces the one with the lower loss on sst5-text. A system that braces refuses is skipped with a note.
Zero-shot
        PopQA, TriviaQA and TruthfulQA of the base and of the adapters of `KNOWLEDGE` trained on the choices, seed 0.
        p-values: exact McNemar test or paired bootstrap of `braces eval`, with Holm's correction over the four metrics.

Two processes can share --out if their --tasks or --systems differ. If a default of braces changes, delete the lines of
the systems that it affects. `tables` yields the tables, so that a test can compare a page with the lines.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from runs import Runs
from tasks import BATCH, TASKS, Task, mean
from transformers.utils import logging

from braces_cli.api import train
from braces_cli.core.adapter.model import open_session
from braces_cli.core.config import build
from braces_cli.core.errors import BracesError
from braces_cli.core.files import write_text
from braces_cli.core.models.tokenize import context_length, has_template
from braces_cli.core.options import LoadOptions
from braces_cli.core.progress import silent
from braces_cli.data.dataset import Reading, read_examples
from braces_cli.evaluation.run import run_evaluation
from braces_cli.evaluation.settings import EvalSettings
from braces_cli.evaluation.statistics import holm
from braces_cli.evaluation.systems import attached, find_eval_adapter
from braces_cli.training.loss import measure
from braces_cli.training.settings import TrainSettings

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
MAX_LENGTH = 512


@dataclass(frozen=True)
class Sizes:
    """Lengths of runs, in optimizer steps, and numbers of rows.

    Attributes:
        extensions: largest number of rates outside the first grid.
        questions: documents per task of the zero-shot part.
    """

    steps: int = 120
    batch: int = 16
    train: int = 10_000
    validation: int = 200
    test: int = 500
    seeds: tuple[int, ...] = (0, 1, 2)
    extensions: int = 4
    questions: int = 400


QUICK = Sizes(steps=2, batch=2, train=8, validation=2, test=2, seeds=(0,), extensions=0, questions=2)


@dataclass(frozen=True)
class System:
    """A method to train.

    Attributes:
        options: options of `braces train`.
        start: rate at the middle of the first grid; None: the default of braces.
        peft: config of a method that `--method peft:CONFIG.json` trains.
    """

    label: str
    options: dict[str, Any] = field(default_factory=dict)
    start: float | None = None
    peft: dict[str, Any] | None = None


def _braces(rank: int, relevance_to: str) -> System:
    return System(f"braces, rank {rank}, relevance to {relevance_to}", {"rank": rank, "relevance_to": relevance_to})


def _lora(rank: int, targets: str, method: str = "lora") -> System:
    name = {"lora": "LoRA", "dora": "DoRA"}[method]
    label = f"{name} r {rank} ({targets.replace('_proj', '').replace(',', ', ')})"
    return System(label, {"method": method, "rank": rank, "lora_targets": [targets]}, 3e-3)


def _peft(name: str, start: float, **config: Any) -> System:
    return System(name, {}, start, {"peft_type": name.upper(), "task_type": "CAUSAL_LM", **config})


SYSTEMS: dict[str, System] = {
    **{f"braces-input-{rank}": _braces(rank, "input") for rank in (4, 16, 53)},
    # Two projections: half the rank has the same number of parameters.
    **{f"braces-output-{rank}": _braces(rank, "output") for rank in (2, 8, 26)},
    **{f"lora-qv-{rank}": _lora(rank, "q_proj,v_proj") for rank in (4, 16)},
    **{f"lora-down-{rank}": _lora(rank, "down_proj") for rank in (4, 16)},
    "dora-qv-16": _lora(16, "q_proj,v_proj", "dora"),
    "ia3": _peft(
        "IA3", 1e-2, target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "vera": _peft("VeRA", 1e-2, r=256, target_modules=["q_proj", "v_proj"]),
    "lokr": _peft("LoKr", 3e-3, r=16, alpha=32, target_modules=["q_proj", "v_proj"]),
}  # fmt: skip
LARGE = ("braces-input-53", "braces-output-26")
SELECTED = ("braces-input-16", "braces-output-8", "lora-qv-4", "lora-qv-16", "lora-down-4", "ia3")
KNOWLEDGE = ("braces-input-16", "braces-output-8", "lora-qv-16")
FIRST = "sst5-text"
CHOICES = ("sst5-labels", "boolq")
# Runs of the search of rates are shorter by this factor, those on chats by another one: a style takes few steps.
TUNING, SHORTER = 2, {"chats": 4}
PARTS = ("comparison", "zero-shot")
# Task in `braces eval` -> its file in the data folder.
QUESTIONS = {
    "popqa": "popqa/test.jsonl", "triviaqa": "triviaqa/validation.jsonl",
    "truthfulqa": "truthfulqa/multiple_choice.jsonl",
}  # fmt: skip
# lm-eval's limit of an answer to TriviaQA. The embedded model's context of this size has no room for a prompt.
TRIVIAQA_TOKENS = 256


def best_rate(loss_of: Callable[[float], float | None], start: float, extensions: int) -> float:
    """Return the rate with the lowest loss on a grid of factor 2, extended while the best rate is at its border.

    Args:
        loss_of: loss at a rate, None if training diverges.
        extensions: largest number of rates outside the first grid of three.
    """

    def rate(step: int) -> float:
        return float(f"{start * 2**step:.3g}")

    def measured(step: int) -> float:
        loss = loss_of(rate(step))
        return math.inf if loss is None else loss

    losses = {step: measured(step) for step in (-1, 0, 1)}
    for _ in range(extensions):
        best = min(losses, key=losses.__getitem__)
        if best not in (min(losses), max(losses)):
            break
        step = best - 1 if best == min(losses) else best + 1
        losses[step] = measured(step)
    return rate(min(losses, key=losses.__getitem__))


class Study:
    """An open base, and the finished runs."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.sizes = QUICK if args.quick else Sizes()
        self.runs = Runs(args.out)
        self.model, self.data = args.model, args.data
        self.work: Path = args.work or args.out.with_suffix(".work")
        self.work.mkdir(parents=True, exist_ok=True)
        self.session = open_session(self.model, None, LoadOptions(dtype="float32"))
        self.tasks: dict[str, Task] = {}
        self.skipped: set[str] = set()

    def task(self, name: str) -> Task:
        """Build a task with the rows of this study, and write these rows."""
        if name not in self.tasks:
            task, sizes = TASKS[name](self.data, has_template(self.session.base.tokenizer)), self.sizes
            rows = {
                "train": task.train[: sizes.train],
                "validation": task.validation[: sizes.validation],
                "test": task.test[: sizes.test],
            }
            for part, examples in rows.items():
                write_text(self.file(name, part), "".join(json.dumps(example.row) + "\n" for example in examples))
            self.tasks[name] = replace(task, **rows)
        return self.tasks[name]

    def file(self, name: str, part: str) -> Path:
        """Return the file of the rows of a task."""
        return self.work / f"{name}-{part}.jsonl"

    def identity(self, part: str, task: str, **more: Any) -> dict[str, Any]:
        return {"model": Path(self.model or "embedded").name, "part": part, "task": task, **more}

    def base(self, name: str) -> None:
        """Measure the base on the test rows of a task."""
        task = self.task(name)
        identity = self.identity("base", name, n=len(task.test))
        self.runs.get(identity, lambda: self.scores(name) | task.constants())

    def compare(self, name: str, system: str) -> None:
        """Search the rate of a system on a task, and measure it at this rate."""
        rate = self.rate(name, system)
        for seed in self.sizes.seeds:
            self.measured("report", name, system, rate, seed)

    def rate(self, name: str, system: str) -> float:
        """Search the rate of a system on a task."""
        start = SYSTEMS[system].start or self.default_rate(SYSTEMS[system].options)
        return best_rate(
            lambda rate: self.measured("tune", name, system, rate, 0)["loss"], start, self.sizes.extensions
        )

    def default_rate(self, options: dict[str, Any]) -> float:
        """Return the rate of `braces train` without --lr."""
        settings = build(TrainSettings, {"data": "rows", "output_dir": "out", **options}, python=True)
        rate = settings.resolve(self.session.ffns[0].hidden_size, MAX_LENGTH).lr
        assert rate is not None
        return rate

    def measured(self, part: str, name: str, system: str, rate: float, seed: int) -> dict[str, Any]:
        """Return a run: its loss on validation rows (`tune`), or all scores on test rows (`report`)."""
        task, tune = self.task(name), part == "tune"
        steps = self.steps(name, tune)

        def work() -> dict[str, Any]:
            try:
                folder, trained = self.trained(name, system, rate, seed, steps, overwrite=True)
            except BracesError as error:
                if not error.message.startswith("training diverged"):
                    raise
                return {"loss": None, "diverged": True}
            with attached(self.session, find_eval_adapter(str(folder))):
                scores = {"loss": self.loss(name, "validation")} if tune else self.scores(name)
            if tune or seed or name not in CHOICES or system not in KNOWLEDGE:
                shutil.rmtree(folder)
            return {"parameters": trained["trainable_parameters"], **scores, "seconds": round(trained["seconds"], 1)}

        settings = {"rate": rate, "seed": seed, "steps": steps, "batch": self.sizes.batch}
        settings["n"] = len(task.validation if tune else task.test)
        return self.runs.get(self.identity(part, name, system=system, **settings), work)

    def steps(self, name: str, tune: bool) -> int:
        """Return the number of optimizer steps of a run."""
        return max(1, self.sizes.steps // (TUNING if tune else 1) // SHORTER.get(name, 1))

    def trained(
        self, name: str, system: str, rate: float, seed: int, steps: int, **how: bool
    ) -> tuple[Path, dict[str, Any]]:
        """Train an adapter; return its folder and the result of `braces train`.

        Args:
            how: `overwrite` or `resume`, as for `braces train`.

        Raises:
            BracesError: `braces train` does not have this method or option, or training diverges.
        """
        self.task(name)
        options = dict(SYSTEMS[system].options)
        if SYSTEMS[system].peft is not None:
            config = self.work / f"{system}.json"
            config.write_text(json.dumps(SYSTEMS[system].peft), encoding="utf-8")
            options["method"] = f"peft:{config}"
        folder = self.work / f"{name}-{system}-{rate:g}-{steps}-{seed}"
        common = {"model": self.model, "dtype": "float32", "max_length": MAX_LENGTH, "batch_size": self.sizes.batch}
        run = {"lr": rate, "seed": seed, "max_steps": steps, "save_steps": 0, **how}
        return folder, train(self.file(name, "train"), folder, **common, **run, **options)

    def scores(self, name: str) -> dict[str, Any]:
        """Return the loss and the metrics of the open model on the test rows."""
        task = self.task(name)
        return {"loss": self.loss(name, "test"), **task.score(self.session, task.test)}

    def loss(self, name: str, part: str) -> float | None:
        """Return the mean loss of the scored tokens of the open model; None if it is not finite."""
        base = self.session.base
        examples = read_examples((str(self.file(name, part)),), Reading(base.tokenizer, MAX_LENGTH))
        found = measure(base.model, examples, None, base.tokenizer.pad_token_id, BATCH, silent, "loss")
        return found.loss if found is not None and math.isfinite(found.loss) else None

    def systems(self, task: str, wanted: Sequence[str]) -> Iterator[str]:
        """Yield the systems of a task that are requested, the better of the two largest adapters of braces last."""
        others = KNOWLEDGE if self.sizes is QUICK else SELECTED
        names = [*SYSTEMS] if task == FIRST else [*others, better(self.runs.done, LARGE)]
        yield from (name for name in names if name in wanted)

    def attempt(self, system: str, work: Callable[[], None]) -> None:
        """Call `work`; if braces refuses the system, skip it from now on, so that the others are measured."""
        if system in self.skipped:
            return
        try:
            work()
        except BracesError as error:
            self.skipped.add(system)
            print(f"{system} is skipped: {error}", file=sys.stderr)

    def zero_shot(self, tasks: Sequence[str], systems: Sequence[str]) -> None:
        """Evaluate base and adapters on questions that they were not trained on."""
        adapters: dict[str, Path] = {}

        def add(task: str, system: str) -> None:
            folder, _ = self.trained(task, system, self.rate(task, system), 0, self.steps(task, False), resume=True)
            adapters[f"{system}, {task}"] = folder

        for task in tasks:
            for system in systems:
                self.attempt(system, lambda task=task, system=system: add(task, system))

        base = self.session.base
        files = dict(QUESTIONS)
        if context_length(base.model.config, base.tokenizer) <= TRIVIAQA_TOKENS:
            del files["triviaqa"]

        def work() -> dict[str, Any]:
            settings = {
                "model": self.model, "adapter": [str(folder) for folder in adapters.values()], "tasks": list(files),
                "task_data": [f"{name}={self.data / file}" for name, file in files.items()],
                "limit": self.sizes.questions, "batch_size": BATCH, "dtype": "float32",
            }  # fmt: skip
            return evaluated(run_evaluation(build(EvalSettings, settings, python=True)), ["base", *adapters])

        identity = {"limit": self.sizes.questions, "steps": self.sizes.steps, "adapters": [*adapters]}
        self.runs.get(self.identity("zero-shot", ",".join(tasks), **identity), work)


def better(runs: Sequence[dict[str, Any]], names: Sequence[str]) -> str:
    """Return the system with the lowest mean loss on the first task, the first system if none is measured."""
    losses = {}
    for name in names:
        found = [run for run in runs if run["part"] == "report" and (run["task"], run["system"]) == (FIRST, name)]
        if found and all(run["loss"] is not None for run in found):
            losses[name] = mean(run["loss"] for run in found)
    return min(losses, key=losses.__getitem__) if losses else names[0]


def evaluated(document: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Return the first metric of each task, and comparisons with the base and between adapters of one task."""
    short = {system["name"]: name for system, name in zip(document["systems"], names, strict=True)}
    results = {
        name: {task: next(iter(metrics.values()))["value"] for task, metrics in system["results"].items()}
        for system, name in zip(document["systems"], names, strict=True)
    }
    first = {task: next(iter(metrics)) for task, metrics in document["systems"][0]["results"].items()}
    comparisons = []
    for each in document["comparisons"]:
        one, other = short[each["from"]], short[each["to"]]
        same_task = one.partition(", ")[2] == other.partition(", ")[2]
        if each["metric"] == first[each["task"]] and (one == "base" or same_task):
            measured = {key: each[key] for key in ("task", "difference", "p_value")}
            comparisons.append({"from": one, "to": other, **measured})
    for pair in {(each["from"], each["to"]) for each in comparisons}:
        of_pair = [each for each in comparisons if (each["from"], each["to"]) == pair]
        for each, p in zip(of_pair, holm([each["p_value"] for each in of_pair]), strict=True):
            each["p_holm"] = p
    return {"results": results, "comparisons": comparisons}


# Tables

TITLES = {
    "sst5-text": "SST-5, text", "triviaqa": "TriviaQA, answers", "sst5-labels": "SST-5, labels as choices",
    "boolq": "BoolQ without passages, true or false", "chats": "Chats in a style that a rule checks",
}  # fmt: skip
# Metric -> title of its column, and whether it is a share.
METRICS = {
    "loss": ("loss", False), "exact_match": ("exact match, %", True), "accuracy": ("accuracy, %", True),
    "style": ("all rules followed, %", True),
}  # fmt: skip
KNOWN = {
    "popqa": "PopQA", "triviaqa": "TriviaQA", "truthfulqa_mc1": "TruthfulQA mc1", "truthfulqa_mc2": "TruthfulQA mc2"
}  # fmt: skip


def tables(runs: Sequence[dict[str, Any]]) -> str:
    """Return the Markdown tables of the runs, one for each model and task."""
    found = []
    for model in dict.fromkeys(run["model"] for run in runs):
        mine = [run for run in runs if run["model"] == model]
        for task in TITLES:
            of_task = [run for run in mine if run["task"] == task and run["part"] in ("base", "report")]
            if of_task:
                found.append(f"### {TITLES[task]} ({model})\n\n{task_table(of_task)}")
        for run in mine:
            if run["part"] == "zero-shot":
                found.append(f"### Zero-shot after training on {run['task']} ({model})\n\n{zero_shot_table(run)}")
    return "\n\n".join(found) + "\n"


def task_table(runs: Sequence[dict[str, Any]]) -> str:
    """Return the table of a task: the mean over seeds and, in brackets, the range."""
    metrics = [metric for metric in METRICS if any(metric in run for run in runs)]
    columns = ["system", "parameters", "rate", *(METRICS[metric][0] for metric in metrics), "seeds", "test rows"]
    lines = []
    for run in runs:
        if run["part"] == "base":
            lines.append(["base", "", "", *(cell([run], metric) for metric in metrics), "", str(run["n"])])
            for key, label in (("chance", "chance"), ("majority", "majority class")):
                if key in run:
                    cells = [f"{100 * run[key]:.1f}" if metric == "accuracy" else "" for metric in metrics]
                    lines.append([label, "", "", *cells, "", str(run["n"])])
    reports = [run for run in runs if run["part"] == "report"]
    # Runs of other settings are separate lines.
    groups = dict.fromkeys((run["system"], run["rate"], run["steps"], run["n"]) for run in reports)
    for group in sorted(groups, key=lambda group: [*SYSTEMS].index(group[0])):
        of_group = [run for run in reports if (run["system"], run["rate"], run["steps"], run["n"]) == group]
        system, rate, _, count = group
        parameters = next((f"{run['parameters']:,}" for run in of_group if "parameters" in run), "")
        cells = [cell(of_group, metric) for metric in metrics]
        lines.append([SYSTEMS[system].label, parameters, f"{rate:g}", *cells, str(len(of_group)), str(count)])
    return markdown(columns, lines, left=1)


def cell(runs: Sequence[dict[str, Any]], metric: str) -> str:
    """`mean (lowest to highest)` over the runs."""
    values = [run.get(metric) for run in runs]
    if None in values:
        return "diverged" if any(run.get("diverged") for run in runs) else ""
    scale, digits = (100, 1) if METRICS[metric][1] else (1, 3)
    low, middle, high = (f"{scale * value:.{digits}f}" for value in (min(values), mean(values), max(values)))
    return middle if len(values) == 1 else f"{middle} ({low} to {high})"


def zero_shot_table(run: dict[str, Any]) -> str:
    """Return scores in percent with p-values against the base, and the differences between adapters."""
    results = run["results"]
    tasks = [task for task in KNOWN if task in results["base"]]
    found = {(each["from"], each["to"], each["task"]): each for each in run["comparisons"]}
    lines = [["base", "", *(f"{100 * results['base'][task]:.1f}" for task in tasks)]]
    for one, other in dict.fromkeys((one, other) for one, other, _ in found):
        label, task_trained = name_of(other)
        compared = [found[one, other, task] for task in tasks]
        if one == "base":
            values = [f"{100 * results[other][task]:.1f}" for task in tasks]
        else:
            label = f"{label} minus {name_of(one)[0]}"
            values = [f"{100 * each['difference']:+.1f}" for each in compared]
        cells = [f"{value} (p = {each['p_holm']:.2g})" for value, each in zip(values, compared, strict=True)]
        lines.append([label, task_trained, *cells])
    return markdown(["system", "trained on", *(KNOWN[task] for task in tasks)], lines, left=2)


def name_of(adapter: str) -> tuple[str, str]:
    """`braces-input-16, boolq` -> label of the system, task."""
    system, _, task = adapter.partition(", ")
    return SYSTEMS[system].label, task


def markdown(columns: Sequence[str], lines: Sequence[Sequence[str]], left: int) -> str:
    rules = ["---" if index < left else "---:" for index in range(len(columns))]
    return "\n".join(f"| {' | '.join(line)} |" for line in (columns, rules, *lines))


def main() -> None:
    args = parse()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    if args.table:
        print(tables(Runs(args.out).done), end="")
        return
    study = Study(args)
    if "comparison" in args.part:
        for task in args.tasks:
            study.base(task)
            for system in study.systems(task, args.systems):
                study.attempt(system, lambda task=task, system=system: study.compare(task, system))
    choices = [task for task in CHOICES if task in args.tasks]
    if "zero-shot" in args.part and choices:
        study.zero_shot(choices, [system for system in KNOWLEDGE if system in args.systems])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub id; default: the embedded model")
    parser.add_argument("--data", type=Path, default=DATA, help="data folder; default: ../shared/data")
    parser.add_argument("--out", type=Path, required=True, help="JSON Lines file of the runs")
    parser.add_argument("--work", type=Path, help="folder for rows and adapters; default: next to --out")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=[*PARTS])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=[*TASKS])
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=[*SYSTEMS])
    parser.add_argument("--quick", action="store_true", help="a few steps and rows: tests the study, shows nothing")
    parser.add_argument("--table", action="store_true", help="print the tables of --out, and measure nothing")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
