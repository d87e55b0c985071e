"""What to measure and how: the options of `braces eval`, checked before anything is loaded. Light: no torch here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from braces_cli.core.attributes.options import AttributeNames, strength_points
from braces_cli.core.attributes.words import built_in
from braces_cli.core.config import ATTRIBUTES, GENERATION, OUTPUT, SCORING, TASKS, option
from braces_cli.core.errors import ConfigError
from braces_cli.core.options import GenerationSettings, ModelSettings, OutputSettings, OverwriteSettings
from braces_cli.core.text import whole_number
from braces_cli.scoring.registry import BUILT_IN

# lm-eval's own, so that without --seed a run draws the few-shot examples that lm-eval draws.
SEEDS = {"python": 0, "numpy": 1234, "torch": 1234, "fewshot": 1234}
# The tasks that generate texts and score them, see `text_quality`.
TEXT_TASKS = ("sentiment", "toxicity")
# Texts for each prompt, where no number is given; 25 are what RealToxicityPrompts takes its maximum over.
_SAMPLES = {"sentiment": 1, "toxicity": 25}
# Tasks and groups that a shell offers after `--tasks`; lm-eval has many more.
TASK_NAMES = (
    "zero_shot", "commonsense", "commonsense_gen", "truthfulqa", "popqa", "triviaqa", "nq_open", "perplexity",
    *TEXT_TASKS, "answers", "detection", "embedded",
)  # fmt: skip


def _parse_scorers(values: Sequence[str]) -> dict[str, str]:
    """`TASK=SCORER` of each value.

    Raises:
        ConfigError: another form, or a task that is not one of the text tasks.
    """
    scorers = {}
    for value in values:
        task, sign, name = value.partition("=")
        if not (sign and name) or task not in TEXT_TASKS:
            hint = f"Such as --scorer {TEXT_TASKS[0]}=vader or --scorer {TEXT_TASKS[1]}=FOLDER."
            raise ConfigError(f"`{value}` is not TASK=SCORER", where="--scorer", hint=hint)
        scorers[task] = name
    return scorers


@dataclass(frozen=True, kw_only=True)
class EvalSettings(GenerationSettings, AttributeNames, ModelSettings, OverwriteSettings, OutputSettings):
    """What `braces eval` measures and how, by which attributes systems are steered, and where results go."""

    first_options = ("tasks", "model", "adapter", "output_dir", "limit")
    required = ("tasks",)

    tasks: tuple[str, ...] = option(
        (),
        help="Tasks or task groups: zero_shot, commonsense, commonsense_gen, truthfulqa, popqa, perplexity, "
        "sentiment, toxicity, answers, "
        "detection or any of lm-eval's; commas between them.",
        metavar="NAMES",
        complete=lambda: TASK_NAMES,
    )
    task_data: tuple[str, ...] = option(
        (), help="File or folder with the rows of a task. Repeatable.", metavar="NAME=FILE", panel=TASKS
    )
    task_data_dir: Path | None = option(
        None, help="Folder with a file (TASK.jsonl, ...) or a folder for each task.", panel=TASKS
    )
    limit: int | None = option(
        None, help="Number of documents per task, from the start of each task. Default: all.", min=1, panel=TASKS
    )
    num_fewshot: int | None = option(
        None, help="Number of few-shot examples before each document. Default: the task's setting.", min=0, panel=TASKS
    )
    apply_chat_template: bool | None = option(
        None,
        help="Apply the chat template. Default: as in training.",
        flag="--apply-chat-template/--no-apply-chat-template",
        panel=TASKS,
    )
    batch_size: str = option(
        "8",
        help="Sequences per forward pass, or auto; halved when memory runs out.",
        metavar="auto|N",
        panel=TASKS,
    )
    seed: int | None = option(  # type: ignore[assignment]
        None, help="Seed of every random choice. Default: lm-eval's own seeds.", min=0, panel=OUTPUT
    )
    no_base: bool = option(False, help="Skip the base and evaluate the adapters only.", panel=TASKS)
    fail_under: tuple[str, ...] = option(
        (),
        help="Exit with code 5 if an adapter (or the base, without an adapter) is worse than this. Repeatable.",
        metavar="TASK:METRIC=VALUE",
        panel=SCORING,
    )

    attribute: tuple[str, ...] = option(
        (),
        help="Attribute: also evaluate each adapter (or the base, without an adapter) steered by this attribute. "
        "Repeatable.",
        metavar="NAME",
        panel=ATTRIBUTES,
        complete=built_in,
    )
    s: tuple[str, ...] = option(
        (),
        help="Strengths of the k-th --attribute, such as -2,0,2 or -4:4:1; each is evaluated separately. Default: 1.",
        metavar="STRENGTHS",
        panel=ATTRIBUTES,
    )
    num_samples: int | None = option(  # type: ignore[assignment]
        None, help="Number of texts per prompt. Default: 25 in the task toxicity, else 1.", min=1, panel=GENERATION
    )
    scorer: tuple[str, ...] = option(
        (),
        help="Scorer of a task: vader, toxicity, fit:ROWS, judge:MODEL, or a classifier's folder or hub id. "
        "Repeatable.",
        metavar="TASK=SCORER",
        complete=lambda: [f"{task}={name}" for task in TEXT_TASKS for name in BUILT_IN],
        panel=SCORING,
    )
    reference_model: str | None = option(
        None,
        help="Reference model for the perplexity of continuations: folder or hub id. Default: the base.",
        panel=SCORING,
    )
    exclude_list_words: bool = option(
        False, help="Remove the words of the attribute from texts before scoring.", panel=SCORING
    )

    adapter: tuple[str, ...] = option(
        (), help="Adapter to evaluate in addition to the base: folder or hub id. Repeatable.", metavar="ADAPTER"
    )
    output_dir: Path | None = option(None, help="Folder for results.json and results.md, updated after each task.")
    log_samples: bool = option(
        False, help="Also write prompt, answer and scores of each document into --output-dir.", panel=OUTPUT
    )
    resume: bool = option(False, help="Skip tasks whose results are already in --output-dir.", panel=OUTPUT)
    plot: Path | None = option(None, help="PNG file for a plot of each metric and system.", panel=OUTPUT)

    def check(self) -> None:
        """Refuse values that only their parsers can judge; files are read by `check_settings`."""
        super().check()
        size = self.batch_size
        if size != "auto" and not whole_number(size):
            raise ConfigError(f"`{size}` is no batch size", where="--batch-size", hint="Give 1 or more, or auto.")
        _ = self.points, self.scorers, self.thresholds

    @property
    def points(self) -> list[dict[str, float]]:
        """Name -> strength of each steered system; none where there is no attribute.

        Raises:
            ConfigError: see `strength_points`.
        """
        return strength_points(self.attribute, self.s)

    def samples(self, task: str) -> int:
        """Texts for each prompt of a text task."""
        return _SAMPLES[task] if self.num_samples is None else self.num_samples

    def steering_record(self) -> dict[str, Any]:
        """How systems are steered, ready for JSON: of one point the strength of each attribute, of several a list."""
        points = self.points
        columns: dict[str, Any] = {name: [point[name] for point in points] for name in self.attribute}
        return {
            "attributes": points[0] if len(points) == 1 else columns,
            "attributes_folder": None if self.attributes is None else str(self.attributes),
        }

    @property
    def scorers(self) -> dict[str, str]:
        """Task -> scorer, where it is not the task's usual one."""
        return _parse_scorers(self.scorer)

    def generation_record(self) -> dict[str, Any]:
        """How texts are generated and scored, ready for JSON."""
        return {
            **self.steering_record(),
            "scorers": self.scorers,
            "num_samples": _SAMPLES if self.num_samples is None else self.num_samples,
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "reference_model": self.reference_model,
            "exclude_list_words": self.exclude_list_words,
        }

    @property
    def sequences(self) -> int | str:
        """The batch size as a number, or `auto`."""
        return "auto" if self.batch_size == "auto" else int(self.batch_size)

    @property
    def thresholds(self) -> Sequence[Threshold]:
        """What each adapter must reach."""
        return parse_thresholds(self.fail_under)

    @property
    def seeds(self) -> dict[str, int]:
        """Seed of each random number generator."""
        return dict(SEEDS) if self.seed is None else dict.fromkeys(SEEDS, self.seed)


@dataclass(frozen=True)
class Threshold:
    """A metric of a task and the value that it must reach."""

    task: str
    metric: str
    value: float


def parse_thresholds(values: Sequence[str]) -> list[Threshold]:
    """`TASK:METRIC=VALUE` of each value.

    Raises:
        ConfigError: another form.
    """
    thresholds = []
    for value in values:
        head, sign, number = value.strip().rpartition("=")
        task, colon, metric = head.rpartition(":")
        try:
            limit = float(number)
        except ValueError:
            limit = math.nan
        if not (sign and colon and task.strip() and metric.strip() and math.isfinite(limit)):
            hint = "Such as --fail-under popqa:acc=0.3."
            raise ConfigError(f"`{value}` is not TASK:METRIC=VALUE", where="--fail-under", hint=hint)
        thresholds.append(Threshold(task.strip(), metric.strip(), limit))
    return thresholds
