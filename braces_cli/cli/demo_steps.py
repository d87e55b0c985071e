"""The steps of `braces demo`: each is a `braces` command, run in this process so that libraries are imported once."""

from __future__ import annotations

import io
import json
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TextIO

PROMPTS = ("The film was", "We stayed at the hotel and", "My new phone")
STRENGTHS = (-3.0, 0.0, 3.0)
SWEEP = "-3:3:1.5"
TASKS = {"embedded_popqa": "questions about facts", "embedded_truthful": "truth against hearsay"}


@dataclass
class Guide:
    """Runs commands one after another, tells what they are, and keeps what they gave.

    Attributes:
        folder: where everything goes.
        seed: of training and sampling.
        tell: where the story is told; None: nowhere.
        dry_run: only tell the commands.
        steps: `{title, command, seconds}` of those run so far.
    """

    folder: Path
    seed: int
    tell: TextIO | None
    dry_run: bool = False
    steps: list[dict[str, Any]] = field(default_factory=list)

    def say(self, text: str) -> None:
        if self.tell is not None:
            print(text, file=self.tell, flush=True)

    def run(self, title: str, *argv: str | Path, lines: bool = False) -> Any:
        """Run one command as if it had been typed; returns its JSON, a list of documents where it writes `lines`."""
        from braces_cli.cli.app import build_app

        args = [str(part) for part in argv]
        command = shlex.join(["braces", *args])
        self.say(f"\n{len(self.steps) + 1}. {title}\n   $ {command}")
        started = time.perf_counter()
        document: Any = None
        if not self.dry_run:
            taken = io.StringIO()
            full = [*args, "--format", "json", "--quiet"]
            # Model cards tell the command that made them, which is this one and not the demo.
            typed, sys.argv = sys.argv, ["braces", *args]
            try:
                with redirect_stdout(taken):
                    build_app(full)(args=full, standalone_mode=False)
            finally:
                sys.argv = typed
            text = taken.getvalue()
            document = [json.loads(line) for line in text.splitlines()] if lines else json.loads(text)
        self.steps.append({"title": title, "command": command, "seconds": time.perf_counter() - started})
        return document


def run_demo(guide: Guide) -> dict[str, Any]:
    """The whole story. Returns `{steps, seconds, scores, texts, sweep, vectors, merge}`, the content of `demo.json`."""
    started = time.perf_counter()
    folder, seed = guide.folder, ("--seed", str(guide.seed))
    rows = folder / "qa_train.jsonl"
    if not guide.dry_run:
        folder.mkdir(parents=True, exist_ok=True)
        with resources.as_file(resources.files("braces_cli.assets") / "embedded_tasks" / "qa_train.jsonl") as source:
            shutil.copyfile(source, rows)

    adapter, baseline = folder / "adapter", folder / "lora"
    train = ("--data", rows, "--epochs", "8", *seed)
    trained = guide.run("Fine-tune an adapter on questions and answers", "train", *train, "--output-dir", adapter)
    guide.say(_figures(trained, "trainable_parameters", "train_loss", "seconds"))
    adapters: list[str | Path] = ["--adapter", adapter]
    if find_spec("peft") is not None:
        lora = guide.run(
            "The same with LoRA, to compare", "train", "--method", "lora", *train, "--output-dir", baseline
        )
        guide.say(_figures(lora, "trainable_parameters", "train_loss", "seconds"))
        adapters += ["--adapter", baseline]
    scored = guide.run(
        "Ask base and adapters what they have not been trained on", "eval", *adapters, "--tasks", ",".join(TASKS),
        "--output-dir", folder / "scores",
    )  # fmt: skip
    scores = [] if scored is None else _scores(scored)
    for task in scores:
        guide.say("   " + task["title"] + ": " + ", ".join(f"{s['name']} {s['value']:.1%}" for s in task["systems"]))

    attributes = folder / "attributes"
    for name in ("positive", "negative"):
        guide.run(
            f"Build the attribute `{name}` from its words",
            "attr-build",
            "--attribute",
            name,
            "--output-dir",
            attributes,
        )
    texts = _steered(guide, attributes, seed)
    steer = ("steer", "--attributes", attributes, "--attribute", "positive")
    sweep = guide.run(
        "Sweep the strength", *steer, "--sweep", SWEEP, "--plot", folder / "sweep.png", *seed,
    )  # fmt: skip
    for point in [] if sweep is None else sweep["points"]:
        guide.say(
            f"   s = {point['s']:+g}: {point['attribute_score']:.0%} positive, perplexity {point['perplexity']:.1f}"
        )
    vectors = guide.run(
        "Which value vectors carry the attribute", "inspect", "find", "--attributes", attributes, "--attribute",
        "positive", "--limit", "8", lines=True,
    )  # fmt: skip
    for row in vectors or ():
        tokens = " ".join(token["token"].strip() or "·" for token in row["tokens"][:8])
        guide.say(f"   layer {row['layer']} vector {row['index']}: {tokens}")
    guide.run(
        "A page that shows the adapter from inside", "inspect", "report", "--adapter", adapter, "--prompt", PROMPTS[0],
        "--output", folder / "report.html",
    )  # fmt: skip
    merge = guide.run(
        "Write it into a plain checkpoint and prove that it is the same", "merge", "--adapter", adapter,
        "--output-dir", folder / "merged",
    )  # fmt: skip
    guide.say(_figures(merge, "architecture", "neurons_added", "max_logit_difference"))
    return {
        "seconds": time.perf_counter() - started, "steps": guide.steps, "training": trained, "scores": scores,
        "texts": texts, "sweep": sweep, "vectors": vectors, "merge": merge,
    }  # fmt: skip


def _steered(guide: Guide, attributes: Path, seed: Sequence[str]) -> list[dict[str, Any]]:
    """`{prompt, texts: {s: text}}` for each prompt, told side by side."""
    prompts = [part for prompt in PROMPTS for part in ("--prompt", prompt)]
    found: dict[str, dict[str, str]] = {}
    for s in STRENGTHS:
        rows = guide.run(
            f"Generate at s = {s:+g}" if s else "Generate unsteered", "steer", "--attributes", attributes,
            "--attribute", "positive", "--s", f"{s:g}", *prompts, "--max-new-tokens", "24", *seed, lines=True,
        )  # fmt: skip
        for row in rows or ():
            found.setdefault(row["prompt"], {})[f"{s:g}"] = row["text"]
            guide.say(f"   {row['prompt']}|{row['text']}")
    return [{"prompt": prompt, "texts": texts} for prompt, texts in found.items()]


def _scores(result: dict[str, Any]) -> list[dict[str, Any]]:
    """`{task, title, metric, systems: [{name, value, stderr, n}]}`, the first metric of each task."""
    listed = []
    for task, title in TASKS.items():
        metric = next(iter(result["systems"][0]["results"][task]))
        systems = [{"name": s["name"], **s["results"][task][metric]} for s in result["systems"]]
        listed.append({"task": task, "title": title, "metric": metric, "systems": systems})
    return listed


def _figures(document: dict[str, Any] | None, *names: str) -> str:
    from braces_cli.cli.render import cell

    if document is None:
        return ""
    return "   " + ", ".join(f"{name.replace('_', ' ')} {cell(document[name])}" for name in names)
