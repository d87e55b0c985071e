"""What a task of ours is, what it is told and what it gives; `evaluation.native_tasks` has the tasks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from braces_cli.core.session import Session
from braces_cli.core.utils.progress import Report, silent
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
