"""`braces demo`: the whole pipeline on the embedded model, one command after another.

Each step is a `braces` command, run in this process so that libraries are imported once.
"""

from __future__ import annotations

import base64
import io
import shlex
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from braces_cli import __version__
from braces_cli.cli.options import command, running
from braces_cli.cli.output import cell, note, print_json, print_table, print_text
from braces_cli.core.config import option
from braces_cli.core.options import OutputSettings, OverwriteSettings
from braces_cli.core.schema import decode

# One axis, its ends built from the words that braces brings.
ATTRIBUTE, OPPOSITE = "positive", "negative"
PROMPTS = ("The film was", "We stayed at the hotel and", "My new phone")
STRENGTHS = (-3.0, 0.0, 3.0)
SWEEP = "-3:3:1.5"
TASKS = {"embedded_popqa": "questions about facts", "embedded_truthful": "truth against hearsay"}
# Of LoRA on queries and values, and what that is beside the adapter's 12,336 parameters.
LORA_RANKS = {4: "as many parameters", 16: "four times as many"}


@dataclass(frozen=True, kw_only=True)
class DemoSettings(OverwriteSettings, OutputSettings):
    """Settings of `braces demo`."""

    first_options = ("output_dir",)

    output_dir: Path = option(Path("demo"), help="Folder for all output of the demo.")


@command
def demo(settings: DemoSettings) -> None:
    """Fine-tune, evaluate, steer, inspect and merge on the small model that braces brings: no hub, no GPU, no data.

    Prints the command that each step stands for, and leaves a folder with a page that shows it all.
    """
    from braces_cli.core.files import output_lock

    with output_lock(None if settings.dry_run else settings.output_dir):
        _demo(settings)


def _demo(settings: DemoSettings) -> None:
    from braces_cli.core.files import check_output_folder, write_json

    folder = settings.output_dir
    if not settings.dry_run:
        import torch

        check_output_folder(folder, settings.overwrite)
        # Matrices this small take longer on two threads than on one.
        torch.set_num_threads(1)
    # With JSON on stdout the account of the steps goes to stderr.
    emit = None if settings.quiet else note if settings.json else print_text
    result = run_demo(Guide(folder, settings.seed, emit, settings.dry_run))
    if settings.dry_run:
        if settings.json:
            print_json({"commands": [step["command"] for step in result["steps"]]})
        return
    write_json(folder / "demo.json", result)
    page = write_page(result, folder)
    if settings.json:
        print_json(result | {"page": str(page)})
        return
    print_text("")
    print_table("What it did", ["", ""], summary(result))
    print_text(f"Everything is in {folder}; open {page}")


def summary(result: dict[str, Any]) -> list[tuple[str, str]]:
    """Rows of the closing table: what, and the figures."""
    points = result["sweep"]["points"]
    rows = [
        (task["title"], ", ".join(f"{system['name']} {system['value']:.1%}" for system in task["systems"]))
        for task in result["scores"]
    ]
    return [
        *rows,
        ("positive texts", ", ".join(f"{point['attribute_score']:.0%} at {point['s']:+g}" for point in points)),
        ("merged checkpoint", f"logits within {result['merge']['max_logit_difference']:.1e} of the adapter's"),
        ("time", f"{result['seconds']:.0f} s"),
    ]


def write_page(result: dict[str, Any], folder: Path) -> Path:
    """Write `index.html` into the demo's folder, the sweep's picture inside it; returns its path."""
    from braces_cli.core.files import write_text
    from braces_cli.core.render import render

    picture = base64.b64encode((folder / "sweep.png").read_bytes()).decode("ascii")
    page = folder / "index.html"
    write_text(page, render("pages/demo.html.j2", {**result, "picture": picture, "version": __version__}))
    return page


@dataclass
class Guide:
    """Runs commands one after another and prints what they are.

    Attributes:
        folder: where everything goes.
        seed: of training and sampling.
        write: prints titles, commands and figures; None: nothing is printed.
        dry_run: print the commands, run nothing.
        steps: `{title, command, seconds}` of the commands run so far.
    """

    folder: Path
    seed: int
    write: Callable[[str], None] | None
    dry_run: bool = False
    steps: list[dict[str, Any]] = field(default_factory=list)

    def emit(self, text: str) -> None:
        if self.write is not None:
            self.write(text)

    def run(self, title: str, *argv: str | Path, lines: bool = False) -> Any:
        """Run one command as if it had been typed; returns its JSON, a list of documents where it writes `lines`."""
        from braces_cli.cli.main import build_app

        args = [str(part) for part in argv]
        command = shlex.join(["braces", *args])
        self.emit(f"\n{len(self.steps) + 1}. {title}\n   $ {command}")
        started = time.perf_counter()
        document: Any = None
        if not self.dry_run:
            stdout = io.StringIO()
            full = [*args, "--format", "json", "--quiet"]
            # Model cards name the command that made them: this step, not the demo.
            with running(["braces", *args]), redirect_stdout(stdout):
                build_app(full)(args=full, standalone_mode=False)
            text = stdout.getvalue()
            document = [decode(line) for line in text.splitlines()] if lines else decode(text)
        self.steps.append({"title": title, "command": command, "seconds": time.perf_counter() - started})
        return document


def run_demo(guide: Guide) -> dict[str, Any]:
    """Run all steps; returns the content of `demo.json`."""
    started = time.perf_counter()
    rows, prompts = _bundled_file(guide, "qa_train.jsonl"), _bundled_file(guide, "prompts.txt")
    adapter = guide.folder / "adapter"
    results = {
        **_fine_tune(guide, rows, adapter),
        **_steer(guide, prompts),
        **_look_inside(guide, adapter),
        **_merge(guide, adapter),
    }
    return {"seconds": time.perf_counter() - started, "steps": guide.steps, **results}


def _bundled_file(guide: Guide, name: str) -> Path:
    """A file that braces brings, copied to where the printed commands find it."""
    from braces_cli.core.files import write_text

    path = guide.folder / name
    if not guide.dry_run:
        source = resources.files("braces_cli.assets") / "embedded_tasks" / name
        write_text(path, source.read_text(encoding="utf-8"))
    return path


def _fine_tune(guide: Guide, rows: Path, adapter: Path) -> dict[str, Any]:
    """`{training, scores}`: the adapter, LoRA of two sizes where peft is installed, and all beside the base."""
    train = ("--data", rows, "--epochs", "8", "--seed", str(guide.seed))
    trained = guide.run("Fine-tune an adapter on questions and answers", "train", *train, "--output-dir", adapter)
    guide.emit(_figures(trained, "trainable_parameters", "train_loss", "seconds"))
    adapters: list[str | Path] = ["--adapter", adapter]
    for rank, size in LORA_RANKS.items() if find_spec("peft") is not None else ():
        other, title = guide.folder / f"lora_r{rank}", f"The same with LoRA, to compare: {size}"
        options = ("--method", "lora", "--rank", str(rank), *train)
        lora = guide.run(title, "train", *options, "--output-dir", other)
        guide.emit(_figures(lora, "trainable_parameters", "train_loss", "seconds"))
        adapters += ["--adapter", other]
    title = "Ask base and adapters what they have not been trained on"
    where = ("--tasks", ",".join(TASKS), "--output-dir", guide.folder / "scores")
    scores = _scores(guide.run(title, "eval", *adapters, *where))
    for task in scores:
        guide.emit("   " + task["title"] + ": " + ", ".join(f"{s['name']} {s['value']:.1%}" for s in task["systems"]))
    return {"training": trained, "scores": scores}


def _steer(guide: Guide, prompts: Path) -> dict[str, Any]:
    """`{texts, sweep, vectors}`: the attribute from its words, texts along it, and the vectors that carry it."""
    folder, seed = guide.folder / "attributes", ("--seed", str(guide.seed))
    for name in (ATTRIBUTE, OPPOSITE):
        guide.run(
            f"Build the attribute {name} from its words", "attr-build", "--attribute", name, "--output-dir", folder
        )
    along = ("--attributes", folder, "--attribute", ATTRIBUTE)
    texts = _texts(guide, *along, *seed)
    sweep = guide.run(
        "Sweep the strength", "steer", *along, "--sweep", SWEEP, "--prompts", prompts, "--num-samples", "4",
        "--max-new-tokens", "32", "--plot", guide.folder / "sweep.png", *seed,
    )  # fmt: skip
    for point in [] if sweep is None else sweep["points"]:
        share, perplexity = point["attribute_score"], point["perplexity"]
        guide.emit(f"   s = {point['s']:+g}: {share:.0%} {ATTRIBUTE}, perplexity {perplexity:.1f}")
    title = "Find the value vectors of the attribute"
    vectors = guide.run(title, "inspect", "find", *along, "--limit", "8", lines=True)
    for row in vectors or ():
        tokens = " ".join(token["token"].strip() or "·" for token in row["tokens"][:8])
        guide.emit(f"   layer {row['layer']} vector {row['index']}: {tokens}")
    return {"texts": texts, "sweep": sweep, "vectors": vectors}


def _texts(guide: Guide, *attribute: str | Path) -> list[dict[str, Any]]:
    """`{prompt, texts: {s: text}}` for each prompt."""
    prompts = [part for prompt in PROMPTS for part in ("--prompt", prompt)]
    texts: dict[str, dict[str, str]] = {}
    for s in STRENGTHS:
        title = f"Generate at s = {s:+g}" if s else "Generate unsteered"
        options = ("--s", f"{s:g}", *prompts, "--max-new-tokens", "24")
        for row in guide.run(title, "steer", *attribute, *options, lines=True) or ():
            texts.setdefault(row["prompt"], {})[f"{s:g}"] = row["text"]
            guide.emit(f"   {row['prompt']}|{row['text']}")
    return [{"prompt": prompt, "texts": by_strength} for prompt, by_strength in texts.items()]


def _look_inside(guide: Guide, adapter: Path) -> dict[str, Any]:
    """`{report}`: a page about the adapter."""
    title, page = "A page that shows what the adapter does inside the model", guide.folder / "report.html"
    report = guide.run(title, "inspect", "report", "--adapter", adapter, "--prompt", PROMPTS[0], "--output", page)
    return {"report": report}


def _merge(guide: Guide, adapter: Path) -> dict[str, Any]:
    """`{merge}`: the adapter as a plain checkpoint; in float32, so that the proof is as sharp as can be."""
    title, folder = (
        "Merge the adapter into a plain checkpoint and verify that it is equivalent",
        guide.folder / "merged",
    )
    merge = guide.run(title, "merge", "--adapter", adapter, "--dtype", "float32", "--output-dir", folder)
    guide.emit(_figures(merge, "architecture", "neurons_added", "max_logit_difference"))
    return {"merge": merge}


def _scores(result: dict[str, Any] | None) -> list[dict[str, Any]]:
    """`{task, title, metric, systems: [{name, value, stderr, n}]}`, the first metric of each task."""
    if result is None:
        return []
    listed = []
    for task, title in TASKS.items():
        metric = next(iter(result["systems"][0]["results"][task]))
        systems = [{"name": s["name"], **s["results"][task][metric]} for s in result["systems"]]
        listed.append({"task": task, "title": title, "metric": metric, "systems": systems})
    return listed


def _figures(document: dict[str, Any] | None, *names: str) -> str:
    if document is None:
        return ""
    return "   " + ", ".join(f"{name.replace('_', ' ')} {cell(document[name])}" for name in names)
