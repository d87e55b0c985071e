"""A task that braces measures itself, without lm-eval: what it is given and what it returns.

A new one is a module with a `NativeTask`, registered in `task_catalog.NATIVE_TASKS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from braces_cli.core.attributes.attribute import Attribute
from braces_cli.core.session import Session
from braces_cli.core.utils.distributed import Processes
from braces_cli.core.utils.progress import Report, silent
from braces_cli.evaluation.settings import TextTaskSettings


@dataclass(frozen=True)
class TaskContext:
    """What a task may need beside its documents.

    Attributes:
        session: the open base, with the adapter on it; `session.adapter` is None for an adapter of peft.
        batch_size: sequences in a forward pass to begin with; see `oom_backoff.halving`.
        chat_template: put prompts into the tokenizer's chat template.
        seed: seed of every random choice.
        processes: use `share_out` so that each process does its part.
        stage: name of the progress bar.
        settings: for tasks that generate texts.
        terms: attributes with their strengths, by which the task steers the model wherever it is measured.
        attributes: all attributes of the run, the same for every system, steered or not.
    """

    session: Session
    batch_size: int
    chat_template: bool = False
    seed: int = 0
    processes: Processes = field(default_factory=Processes)
    stage: str = ""
    report: Report = silent
    settings: TextTaskSettings = field(default_factory=TextTaskSettings)
    terms: Sequence[tuple[Attribute, float]] = ()
    attributes: Sequence[Attribute] = ()


@dataclass
class TaskResult:
    """What one system scored on a native task.

    Attributes:
        results: metric -> `{value, stderr, n}`, n the number of documents.
        documents: metric -> document -> value.
        units: metric -> document -> what the metric divides by, where it is a ratio of sums.
        samples: document -> `prompt` and `answer` for the per-sample log.
        batch_size: the batch size that fitted into memory.
    """

    results: dict[str, dict[str, Any]]
    documents: dict[str, dict[int, float]]
    units: dict[str, dict[int, float]] = field(default_factory=dict)
    samples: dict[int, dict[str, Any]] = field(default_factory=dict)
    batch_size: int = 1


@dataclass(frozen=True)
class NativeTask:
    """A task that braces measures itself.

    Attributes:
        read: documents of a data file; raises DataError.
        measure: results on documents, on every process alike.
        metrics: metric -> whether more of it is better, in the order they are shown.
        data: what its data file holds, for the hint where there is none.
    """

    name: str
    read: Callable[[Path], Sequence[Any]]
    measure: Callable[[TaskContext, Sequence[Any]], TaskResult]
    metrics: dict[str, bool]
    data: str
