"""lm-eval as a library: tasks built once, measured on the model that is in memory.

`simple_evaluate` spends six seconds of every call on facts about the machine. So `lm_eval.evaluate` is called here;
what else `simple_evaluate` does (seeds, few-shot settings) is done before it, in the same order.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import lm_eval
import numpy as np
import torch
from lm_eval.models.huggingface import HFLM

from braces_cli.core.utils.distributed import Processes
from braces_cli.core.utils.errors import BracesError
from braces_cli.core.utils.progress import Report, silent
from braces_cli.evaluation.oom_backoff import halving
from braces_cli.evaluation.scores import Scores, collect
from braces_cli.evaluation.settings import SEEDS
from braces_cli.evaluation.task_loading import TaskUnit, muted


@dataclass(frozen=True)
class HarnessSettings:
    """How tasks are measured, the same for every system.

    Attributes:
        batch_size: sequences in a forward pass, or `auto`.
        limit: documents of each task, from the front; None for all.
        num_fewshot: examples in front; a task that fixes 0 keeps it, as in lm-eval.
        chat_template: put the prompts into the tokenizer's chat template, examples as turns of their own.
    """

    batch_size: int | str = 8
    limit: int | None = None
    num_fewshot: int | None = None
    chat_template: bool = False
    seeds: dict[str, int] = field(default_factory=lambda: dict(SEEDS))


class Model(HFLM):
    """HFLM on a model in memory, one process of several, whose progress goes to a `Report` instead of its own bars."""

    batch_size_per_gpu: Any

    def __init__(self, model: Any, tokenizer: Any, batch_size: int | str, report: Report, processes: Processes) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, trust_remote_code=False)
        self.stage, self._report = "", report
        # lm-eval shards by the rank and world size of its model, and sets both to one process for a model given to it.
        self._processes = processes
        if processes.accelerator is not None:
            self.accelerator = processes.accelerator

    @property
    def rank(self) -> int:
        return self._processes.rank

    @property
    def world_size(self) -> int:
        return self._processes.size

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
        return self._halving("choices", requests, super().loglikelihood)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
        return self._halving("texts", requests, super().loglikelihood_rolling)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        return self._halving("answers", requests, super().generate_until)

    def _halving(self, what: str, requests: list[Any], run: Callable[..., list[Any]]) -> list[Any]:
        stage = f"{self.stage}, {what}"
        automatic = self.batch_size_per_gpu == "auto"

        def attempt(size: int) -> list[Any]:
            # lm-eval looks for the largest that fits, beginning here; it only tries forward passes.
            self.max_batch_size = size
            self.batch_size_per_gpu = "auto" if automatic else size
            with self._counted(stage, len(requests)):
                return run(requests, disable_tqdm=True)

        first = self.max_batch_size if automatic else self.batch_size_per_gpu
        answers, _ = halving(attempt, int(first or 1), stage)
        return answers

    @contextlib.contextmanager
    def _counted(self, stage: str, total: int) -> Iterator[None]:
        done = 0

        def count(module: Any, args: tuple, kwargs: dict) -> None:
            nonlocal done
            ids = args[0] if args else kwargs.get("input_ids")
            # A step of generation carries one token a row; its rows were counted with their prompts.
            if ids is not None and ids.ndim == 2 and ids.shape[1] > 1:
                done = min(done + ids.shape[0], total)
                self._report(stage, done, total)

        handle = self.model.register_forward_pre_hook(count, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
        self._report(stage, total, total)


def measure(
    model: Any,
    tokenizer: Any,
    unit: TaskUnit,
    settings: HarnessSettings,
    *,
    stage: str,
    report: Report = silent,
    processes: Processes | None = None,
) -> Scores | None:
    """Score a model in memory, as it stands, on a unit of tasks.

    Args:
        stage: what the progress is called.

    Returns:
        The scores; None on every process but the first.
    """
    processes = processes or Processes()
    shots = _set_up(unit, settings)
    with muted():
        if not _enough(unit, settings.limit, processes.size):
            # lm-eval has no way to give a process no document at all.
            if not processes.first:
                return None
            processes = Processes()
        wrapped = Model(model, tokenizer, settings.batch_size, report, processes)
        wrapped.stage = stage
        output = lm_eval.evaluate(
            lm=wrapped,
            task_dict=unit.loaded,
            limit=settings.limit,
            log_samples=True,
            apply_chat_template=settings.chat_template,
            fewshot_as_multiturn=settings.chat_template,
        )
    if output is None:
        if not processes.first:
            return None
        raise BracesError("lm-eval gave no results", where=stage, hint="This is a fault of braces.")
    auto = wrapped.batch_size_per_gpu == "auto"
    chosen = wrapped.batch_sizes.values() if auto else [wrapped.batch_size_per_gpu]
    return collect(output, shots, sorted({int(size) for size in chosen}))


def _enough(unit: TaskUnit, limit: int | None, size: int) -> bool:
    """Whether each process gets a document of each task."""
    return size == 1 or all(min(len(task.eval_docs), limit or size) >= size for task in unit.tasks.values())


def _set_up(unit: TaskUnit, settings: HarnessSettings) -> dict[str, int]:
    random.seed(settings.seeds["python"])
    np.random.seed(settings.seeds["numpy"])
    torch.manual_seed(settings.seeds["torch"])
    shots: dict[str, int] = {}
    for name, task in unit.tasks.items():
        default = task.get_config("num_fewshot")
        if settings.num_fewshot is not None and default != 0:
            task.set_config(key="num_fewshot", value=settings.num_fewshot)
        elif default is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=settings.seeds["fewshot"])
        shots[name] = int(task.get_config("num_fewshot") or 0)
    return shots
