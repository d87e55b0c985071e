"""Tasks that lm-eval cannot run, each registered here: what it reads, and how it measures the model that is open.

A new one is a module with a `TASK`, and its line in `TASKS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from braces_cli.core.progress import Report, silent
from braces_cli.core.session import Session
from braces_cli.evaluation.memory import halving
from braces_cli.evaluation.processes import Processes


@dataclass(frozen=True)
class Generation:
    """How tasks that write texts write them, and by what they score them; see `text_quality`.

    Attributes:
        attributes: name -> strength, on every system alike: an adapter's own or, without one, from word lists.
        attributes_folder: that attr-build wrote.
        scorers: task -> scorer, where it is not the task's usual one.
        num_samples: texts for each prompt.
        judge_model: tells perplexity in place of the base.
        exclude_list_words: scorers do not look at the attributes' own words.
    """

    attributes: dict[str, float] = field(default_factory=dict)
    attributes_folder: Path | None = None
    scorers: dict[str, str] = field(default_factory=dict)
    num_samples: int = 1
    max_new_tokens: int = 50
    temperature: float = 1.0
    top_p: float = 0.9
    judge_model: str | None = None
    exclude_list_words: bool = False


@dataclass(frozen=True)
class Setting:
    """What a task may want to know beside its documents.

    Attributes:
        session: the open base, the adapter being on it; `session.adapter` is None for one of peft.
        batch_size: sequences a forward pass to begin with; see `memory.halving`.
        seed: of every random choice.
        processes: use `share_out` so that each process does its part.
        stage: what the progress is called.
        generation: for tasks that write texts.
    """

    session: Session
    batch_size: int
    seed: int = 0
    processes: Processes = field(default_factory=Processes)
    stage: str = ""
    report: Report = silent
    generation: Generation = field(default_factory=Generation)


@dataclass
class Measured:
    """What one system scored on an own task.

    Attributes:
        results: metric -> `{value, stderr, n}`, n the number of documents.
        documents: metric -> document -> value.
        units: metric -> document -> what the metric divides by, where it is a ratio of sums.
        samples: document -> what the per-sample log tells of it (`prompt`, `answer`).
        batch_size: the one that memory sufficed for.
    """

    results: dict[str, dict[str, Any]]
    documents: dict[str, dict[int, float]]
    units: dict[str, dict[int, float]] = field(default_factory=dict)
    samples: dict[int, dict[str, Any]] = field(default_factory=dict)
    batch_size: int = 1


@dataclass(frozen=True)
class OwnTask:
    """A task of ours.

    Attributes:
        read: documents of a data file; raises DataError.
        measure: results on documents, on every process alike.
        metrics: metric -> whether more of it is better, in the order they are shown.
        data: what its data file is, for the hint where there is none.
    """

    name: str
    read: Callable[[Path], Sequence[Any]]
    measure: Callable[[Setting, Sequence[Any]], Measured]
    metrics: dict[str, bool]
    data: str


def _read_texts(path: Path) -> Sequence[Any]:
    from braces_cli.evaluation.task_data import read_texts

    return read_texts(path)


def _measure_perplexity(setting: Setting, texts: Sequence[str]) -> Measured:
    from braces_cli.evaluation import perplexity

    base = setting.session.base
    found, size = halving(
        lambda size: perplexity.measure(
            base.model,
            base.tokenizer,
            texts,
            size,
            lambda _, done, total: setting.report(setting.stage, done, total),
            setting.processes,
        ),
        setting.batch_size,
        setting.stage,
    )
    samples = {index: {"prompt": "", "answer": text} for index, text in enumerate(texts)}
    return Measured(found.results, found.nats, found.units, samples, size)


PERPLEXITY = OwnTask(
    "perplexity",
    _read_texts,
    _measure_perplexity,
    dict.fromkeys(("word_perplexity", "byte_perplexity", "bits_per_byte", "token_perplexity"), False),
    ".txt, or rows with `text`",
)


def _text_quality(name: str, scored: dict[str, bool]) -> OwnTask:
    def read(path: Path) -> Sequence[Any]:
        from braces_cli.evaluation import text_quality

        return text_quality.read(path)

    def measure(setting: Setting, prompts: Sequence[Any]) -> Measured:
        from braces_cli.evaluation import text_quality

        return text_quality.measurer(name)(setting, prompts)

    diversity = dict.fromkeys(("distinct_1", "distinct_2", "distinct_3"), True)
    metrics = {**scored, "perplexity": False, **diversity, "repetition": False}
    return OwnTask(name, read, measure, metrics, "prompts, one a line, or rows with `prompt`")


SENTIMENT = _text_quality("sentiment", {"positive": True, "negative": False})
TOXICITY = _text_quality("toxicity", {"toxic": False})

TASKS: dict[str, OwnTask] = {task.name: task for task in (PERPLEXITY, SENTIMENT, TOXICITY)}
