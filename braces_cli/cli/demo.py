"""`braces demo`: all steps on the embedded model, one command after another.

Each step is a `braces` command that runs in this process, so that libraries are imported once.
"""

import base64
import io
import shlex
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from braces_cli import __version__
from braces_cli.cli.options import command
from braces_cli.cli.output import cell, note, print_json, print_text
from braces_cli.core.config import option
from braces_cli.core.options import OutputSettings, OverwriteSettings, SeedSettings
from braces_cli.core.schema import decode

# One axis, with the two built-in word lists.
ATTRIBUTE = "positive"
PROMPTS = ("The film was", "We stayed at the hotel and", "My new phone")
STRENGTHS = (-3.0, 0.0, 3.0)
SWEEP = "-3:3:1.5"
TASKS = {"embedded_popqa": "questions about facts", "embedded_truthful": "truth against hearsay"}
# Rank of LoRA on queries and values -> its size compared with the adapter's 12,336 parameters.
LORA_RANKS = {4: "as many parameters", 16: "four times as many"}


@dataclass(frozen=True, kw_only=True)
class DemoSettings(OverwriteSettings, SeedSettings, OutputSettings):
    """Settings of `braces demo`.

    Attributes:
        output_dir: Folder for all output of the demo.
    """

    first_options = ("output_dir",)

    output_dir: Path = option(Path("demo"))


@command
def demo(settings: DemoSettings) -> None:
    """Fine-tune, evaluate, steer, inspect and merge on the small model that braces brings: no hub, no GPU, no data.

    Prints the command that each step stands for, and leaves a folder with a page that shows it all.
    """
    from braces_cli.core.files import check_output_folder, output_lock, write_json, write_text
    from braces_cli.core.render import render

    folder = settings.output_dir
    # With JSON on stdout the description of the steps goes to stderr.
    emit = (lambda text: None) if settings.quiet else note if settings.json else print_text
    if settings.dry_run:
        result = run_demo(Guide(folder, settings.seed, emit, dry_run=True))
        if settings.json:
            print_json({"commands": [step["command"] for step in result["steps"]]})
        return
    import torch

    with output_lock(folder):
        check_output_folder(folder, settings.overwrite)
        torch.set_num_threads(1)  # small matrices take longer on two threads
        result = run_demo(Guide(folder, settings.seed, emit))
        write_json(folder / "demo.json", result)
        page = folder / "index.html"
        picture = base64.b64encode((folder / "sweep.png").read_bytes()).decode("ascii")
        write_text(page, render("pages/demo.html.j2", {**result, "picture": picture, "version": __version__}))
    if settings.json:
        print_json(result | {"page": str(page)})
        return
    print_text("")
    print_text(f"Everything is in {folder}; open {page}")


@dataclass
class Guide:
    """Run commands one after another and print them.

    Attributes:
        folder: output folder of the demo.
        seed: for training and sampling.
        write: prints titles, commands and figures.
        dry_run: print the commands without running them.
        steps: `{title, command, seconds}` of each command.
    """

    folder: Path
    seed: int
    write: Callable[[str], object]
    dry_run: bool = False
    steps: list[dict[str, Any]] = field(default_factory=list)

    def figures(self, document: dict[str, Any] | None, *names: str) -> None:
        if document is not None:
            self.write("   " + ", ".join(f"{name.replace('_', ' ')} {cell(document[name])}" for name in names))

    def run(self, title: str, *argv: str | Path, lines: bool = False) -> Any:
        """Run one command and return its JSON document, or a list of documents if the command prints `lines`."""
        from braces_cli.cli.main import build_app

        args = [str(part) for part in argv]
        command = shlex.join(["braces", *args])
        self.write(f"\n{len(self.steps) + 1}. {title}\n   $ {command}")
        started = time.perf_counter()
        document: Any = None
        if not self.dry_run:
            stdout = io.StringIO()
            full = [*args, "--format", "json", "--quiet"]
            # Model cards contain the command of the step, not that of the demo.
            own, sys.argv = sys.argv, ["braces", *args]
            try:
                with redirect_stdout(stdout):
                    build_app(full)(args=full, standalone_mode=False)
            finally:
                sys.argv = own
            text = stdout.getvalue()
            document = [decode(line) for line in text.splitlines()] if lines else decode(text)
        self.steps.append({"title": title, "command": command, "seconds": time.perf_counter() - started})
        return document

    def copied(self, name: str) -> Path:
        """Copy a file of the package to the folder, where the printed commands read it."""
        from braces_cli.core.files import write_text

        path = self.folder / name
        if not self.dry_run:
            source = resources.files("braces_cli.assets") / "embedded_tasks" / name
            write_text(path, source.read_text(encoding="utf-8"))
        return path


def run_demo(guide: Guide) -> dict[str, Any]:
    """Run all steps and return the content of `demo.json`."""
    started = time.perf_counter()
    folder, seed = guide.folder, ("--seed", str(guide.seed))
    rows, prompts, adapter = guide.copied("qa_train.jsonl"), guide.copied("prompts.txt"), folder / "adapter"

    train = ("--data", rows, "--epochs", "8", *seed)
    trained = guide.run("Fine-tune an adapter on questions and answers", "train", *train, "--output-dir", adapter)
    guide.figures(trained, "trainable_parameters", "train_loss", "seconds")
    adapters: list[str | Path] = ["--adapter", adapter]
    for rank, size in LORA_RANKS.items():
        other, title = folder / f"lora_r{rank}", f"The same with LoRA, to compare: {size}"
        lora = guide.run(title, "train", "--method", "lora", "--rank", str(rank), *train, "--output-dir", other)
        guide.figures(lora, "trainable_parameters", "train_loss", "seconds")
        adapters += ["--adapter", other]
    title = "Ask base and adapters what they have not been trained on"
    evaluated = guide.run(title, "eval", *adapters, "--tasks", ",".join(TASKS), "--output-dir", folder / "scores")
    scores = []
    for task, title in TASKS.items() if evaluated else ():
        metric = next(iter(evaluated["systems"][0]["results"][task]))
        systems = [{"name": s["name"], **s["results"][task][metric]} for s in evaluated["systems"]]
        scores.append({"task": task, "title": title, "metric": metric, "systems": systems})
        guide.write(f"   {title}: " + ", ".join(f"{system['name']} {system['value']:.1%}" for system in systems))

    steered = _steer(guide, prompts)

    title, page = "A page that shows what the adapter does inside the model", folder / "report.html"
    report = guide.run(title, "inspect", "report", "--adapter", adapter, "--prompt", PROMPTS[0], "--output", page)
    title, merged = "Merge the adapter into a plain checkpoint and verify that it is equivalent", folder / "merged"
    # In float32, for a precise verification.
    merge = guide.run(title, "merge", "--adapter", adapter, "--dtype", "float32", "--output-dir", merged)
    guide.figures(merge, "architecture", "neurons_added", "max_logit_difference")
    return {
        "seconds": time.perf_counter() - started,
        "steps": guide.steps,
        "training": trained,
        "scores": scores,
        **steered,
        "report": report,
        "merge": merge,
    }


def _steer(guide: Guide, prompts: Path) -> dict[str, Any]:
    """Return `{texts, sweep, vectors}`: texts and scores at several strengths, and value vectors of the attribute."""
    folder, seed = guide.folder / "attributes", ("--seed", str(guide.seed))
    title = f"Build the attribute {ATTRIBUTE} from its words"
    guide.run(title, "attr-build", "--attribute", ATTRIBUTE, "--output-dir", folder)
    along = ("--attributes", folder, "--attribute", ATTRIBUTE)
    texts: dict[str, dict[str, str]] = {}
    for s in STRENGTHS:
        title = f"Generate at s = {s:+g}" if s else "Generate unsteered"
        prompt_options = [part for prompt in PROMPTS for part in ("--prompt", prompt)]
        options: list[str | Path] = [*along, *seed, "--s", f"{s:g}", *prompt_options, "--max-new-tokens", "24"]
        for row in guide.run(title, "steer", *options, lines=True) or ():
            texts.setdefault(row["prompt"], {})[f"{s:g}"] = row["text"]
            guide.write(f"   {row['prompt']}|{row['text']}")
    sweep = guide.run(
        "Sweep the strength", "steer", *along, "--sweep", SWEEP, "--prompts", prompts, "--num-samples", "4",
        "--max-new-tokens", "32", "--plot", guide.folder / "sweep.png", *seed,
    )  # fmt: skip
    for point in [] if sweep is None else sweep["points"]:
        share, perplexity = point["attribute_score"], point["perplexity"]
        guide.write(f"   s = {point['s']:+g}: {share:.0%} {ATTRIBUTE}, perplexity {perplexity:.1f}")
    title = "Find the value vectors of the attribute"
    vectors = guide.run(title, "inspect", "find", *along, "--limit", "8", lines=True)
    for row in vectors or ():
        tokens = " ".join(token["token"].strip() or "·" for token in row["tokens"][:8])
        guide.write(f"   layer {row['layer']} vector {row['index']}: {tokens}")
    listed = [{"prompt": prompt, "texts": by_strength} for prompt, by_strength in texts.items()]
    return {"texts": listed, "sweep": sweep, "vectors": vectors}
