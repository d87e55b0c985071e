"""Settings of `braces eval`. Imports no torch."""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from braces_cli.core import options
from braces_cli.core.attributes.options import AttributeNames, SteeredTokens, strength_points
from braces_cli.core.config import ATTRIBUTES, GENERATION, OUTPUT, SCORING, TASKS, option
from braces_cli.core.errors import ConfigError

# lm-eval's seeds: without --seed, few-shot examples are those of lm-eval.
SEEDS = {"python": 0, "numpy": 1234, "torch": 1234, "fewshot": 1234}
# Tasks that generate texts and score them, see `text_tasks`.
TEXT_TASKS = ("sentiment", "toxicity")
# Default texts per prompt; RealToxicityPrompts takes its maximum over 25.
SAMPLES = {"sentiment": 1, "toxicity": 25}
# Settings that texts and their scores depend on.
_GENERATION = ("max_new_tokens", "temperature", "top_p", "reference_model", "exclude_list_words")


@dataclass(frozen=True, kw_only=True)
class EvalSettings(
    options.GenerationSettings,
    options.ScoringSettings,
    AttributeNames,
    SteeredTokens,
    options.ModelSettings,
    options.OverwriteSettings,
    options.OutputSettings,
):
    """Systems, tasks, steering, text generation and outputs of `braces eval`.

    Attributes:
        tasks: Tasks or task groups, separated by commas: zero_shot, commonsense, commonsense_gen, truthfulqa, popqa,
            perplexity, sentiment, toxicity, answers, detection, or any of lm-eval.
        task_data: File or folder with the rows of a task. Repeatable.
        task_data_dir: Folder with a file (TASK.jsonl, ...) or a folder for each task.
        limit: Number of documents per task, from the start of each task. Default: all.
        num_fewshot: Number of few-shot examples before each document. Default: the task's setting.
        batch_size: Sequences per forward pass, or auto; halved when memory runs out.
        seed: Seed of every random choice. Default: lm-eval's own seeds.
        no_base: Skip the base and evaluate the adapters only.
        fail_under: Exit with code 5 if an adapter (or the base, without an adapter) is worse than this. Repeatable.
        attribute: Attribute: also evaluate each adapter (or the base, without an adapter) steered by this attribute.
            Repeatable.
        s: Strengths of the k-th --attribute, such as -2,0,2 or -4:4:1; each is evaluated separately. Default: 1.
        num_samples: Number of texts per prompt. Default: 25 in the task toxicity, else 1.
        scorer: Scorer of a task: vader, toxicity, fit:ROWS, judge:MODEL, or a classifier's folder or hub id.
            Repeatable.
        adapter: Adapter to evaluate in addition to the base: folder or hub id. Repeatable.
        output_dir: Folder for results.json and results.md, updated after each task.
        log_samples: Also write prompt, answer and scores of each document into --output-dir.
        resume: Skip tasks whose results are already in --output-dir.
    """

    first_options = ("tasks", "model", "adapter", "output_dir", "limit")
    required = ("tasks",)

    tasks: tuple[str, ...] = option((), metavar="NAMES")
    task_data: tuple[str, ...] = option((), metavar="NAME=FILE", panel=TASKS)
    task_data_dir: Path | None = option(None, panel=TASKS)
    limit: int | None = option(None, min=1, panel=TASKS)
    num_fewshot: int | None = option(None, min=0, panel=TASKS)
    batch_size: str = option("8", metavar="auto|N", panel=TASKS)
    seed: int | None = option(None, min=0, panel=OUTPUT)
    no_base: bool = option(False, panel=TASKS)
    fail_under: tuple[str, ...] = option((), metavar="TASK:METRIC=VALUE", panel=SCORING)

    attribute: tuple[str, ...] = option((), metavar="NAME", panel=ATTRIBUTES)
    s: tuple[str, ...] = option((), metavar="STRENGTHS", panel=ATTRIBUTES)
    num_samples: int | None = option(None, min=1, panel=GENERATION)  # type: ignore[assignment]
    scorer: tuple[str, ...] = option((), metavar="TASK=SCORER", panel=SCORING)

    adapter: tuple[str, ...] = option((), metavar="ADAPTER")
    output_dir: Path | None = option(None)
    log_samples: bool = option(False, panel=OUTPUT)
    resume: bool = option(False, panel=OUTPUT)

    def check(self) -> None:
        """Parse composite values once, so that errors come before anything is loaded."""
        super().check()
        size = self.batch_size
        if size != "auto" and not re.fullmatch("0*[1-9][0-9]{0,8}", size):
            raise ConfigError(f"`{size}` is not a batch size", where="--batch-size", hint="Give 1 or more, or auto.")
        if self.output_dir is None and (self.resume or self.log_samples):
            where = "--resume" if self.resume else "--log-samples"
            raise ConfigError("needs an output folder", where=where, hint="Give --output-dir.")
        _ = self.points, self.scorers, self.thresholds

    @property
    def points(self) -> list[dict[str, float]]:
        """Attribute -> strength, for each steered system."""
        return strength_points(self.attribute, self.s)

    def steering_record(self) -> dict[str, Any]:
        """Return attributes and strengths for the result; lists of strengths if there are several points."""
        points, folder = self.points, self.attributes
        columns: dict[str, Any] = {name: [point[name] for point in points] for name in self.attribute}
        attributes = points[0] if len(points) == 1 else columns
        place = None if folder is None else str(folder)
        return {"attributes": attributes, "attributes_folder": place, "scope": self.scope}

    @property
    def scorers(self) -> dict[str, str]:
        """Text task -> scorer, from `--scorer TASK=SCORER`."""
        scorers = {}
        for value in self.scorer:
            task, sign, name = value.partition("=")
            if not (sign and name) or task not in TEXT_TASKS:
                hint = f"Such as --scorer {TEXT_TASKS[0]}=vader or --scorer {TEXT_TASKS[1]}=FOLDER."
                raise ConfigError(f"`{value}` is not TASK=SCORER", where="--scorer", hint=hint)
            scorers[task] = name
        return scorers

    def generation_record(self) -> dict[str, Any]:
        """Return how texts are generated and scored, for the result."""
        return {
            **self.steering_record(),
            "scorers": self.scorers,
            "num_samples": self.num_samples or SAMPLES,
            **{name: getattr(self, name) for name in _GENERATION},
        }

    @property
    def thresholds(self) -> list[tuple[str, str, float]]:
        """(task, metric, value) of `--fail-under TASK:METRIC=VALUE`; task names can contain `:` and `=`."""
        thresholds = []
        for value in self.fail_under:
            head, _, number = value.rpartition("=")
            task, _, metric = (part.strip() for part in head.rpartition(":"))
            try:
                limit = float(number)
            except ValueError:
                limit = math.nan
            if not (task and metric and math.isfinite(limit)):
                hint = "Such as --fail-under popqa:acc=0.3."
                raise ConfigError(f"`{value}` is not TASK:METRIC=VALUE", where="--fail-under", hint=hint)
            thresholds.append((task, metric, limit))
        return thresholds

    @property
    def seeds(self) -> dict[str, int]:
        """Seed of each random number generator."""
        return dict(SEEDS) if self.seed is None else dict.fromkeys(SEEDS, self.seed)
