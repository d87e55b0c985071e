"""Selected tasks -> lm-eval's task objects with their data, all of it checked before a model is loaded.

lm-eval as a library: tasks built once, measured on the model that is in memory.

`simple_evaluate` spends six seconds of every call on facts about the machine. So `lm_eval.evaluate` is called here;
what else `simple_evaluate` does (seeds, few-shot settings) is done before it, in the same order.
"""

from __future__ import annotations

import contextlib
import io
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import torch
from jinja2 import TemplateError
from lm_eval.models.huggingface import HFLM

from braces_cli.core.distributed import Processes
from braces_cli.core.errors import BracesError, ConfigError, DataError, first_line
from braces_cli.core.progress import Report, silent
from braces_cli.evaluation import catalog
from braces_cli.evaluation.native_tasks import halving
from braces_cli.evaluation.results import Scores, collect
from braces_cli.evaluation.settings import SEEDS

logger = logging.getLogger("braces")

# What a task's templates and functions raise for a row that lacks a field, or holds a value of another kind.
_ROW_ERRORS = (TemplateError, LookupError, TypeError, ValueError, AttributeError, AssertionError)


@dataclass(frozen=True)
class TaskUnit:
    """What is measured in one go and stored when it is done: a task, or a group of lm-eval's with all its tasks.

    Attributes:
        loaded: what `lm_eval.evaluate` takes as `task_dict`.
    """

    name: str
    loaded: dict[str, Any]

    @property
    def tasks(self) -> dict[str, Any]:
        tasks: dict[str, Any] = self.loaded["tasks"]
        return tasks


def load_tasks(selection: catalog.Selection, overrides: Path, metadata: dict[str, Any]) -> list[TaskUnit]:
    """Build the selected tasks with their data, from the hub where `overrides` holds none for them.

    Raises:
        ConfigError: a task given twice through two groups, one that runs code a model writes, or needs pictures.
        DataError: data that cannot be fetched, or that the task cannot read.
    """
    units: list[TaskUnit] = []
    seen: set[str] = set()
    manager = catalog.manager(selection, overrides, metadata)
    for name in selection.names:
        with muted():
            try:
                part = manager.load([name])
            except (SystemExit, Exception) as error:
                # A task is code of lm-eval's that builds or downloads its data, and may raise anything, even this.
                raise _unbuilt(name, error, (overrides / f"{name}.yaml").exists()) from error
        units.append(TaskUnit(name, dict(part)))
        twice = sorted(part["tasks"].keys() & seen)
        if twice:
            raise ConfigError(f"`{twice[0]}` is in two of the requested groups", where="--tasks", hint="Leave one out.")
        seen |= part["tasks"].keys()
        for task_name, task in part["tasks"].items():
            if getattr(task, "UNSAFE_CODE", False):
                hint = "Use lm-eval for it."
                raise ConfigError(f"`{task_name}` runs code that the model writes", where="--tasks", hint=hint)
            if getattr(task, "MULTIMODAL", False):
                hint = "Choose a task that needs only text."
                raise ConfigError(f"`{task_name}` needs input other than text", where="--tasks", hint=hint)
    return units


def check_documents(units: Sequence[TaskUnit], files: dict[str, Path], limit: int | None) -> None:
    """Let each task with a local file read every document it will be measured on, before a model is loaded.

    Raises:
        DataError: a row that the task cannot read, or no documents at all.
    """
    for unit in units:
        for name, task in unit.tasks.items():
            if not len(task.eval_docs):
                where = str(files.get(name, name))
                raise DataError(f"{name} has no documents", where=where, hint="Give rows with --task-data.")
            if name not in files:
                continue
            for number, doc in task.doc_iterator(limit=limit):
                try:
                    task.doc_to_text(doc)
                    task.doc_to_target(doc)
                    if task.get_config("doc_to_choice") is not None:
                        task.doc_to_choice(doc)
                except _ROW_ERRORS as error:
                    what = f"{name} cannot read the row: {first_line(error, 300)}"
                    hint = f"Found: {', '.join(map(str, doc))}."
                    raise DataError(what, where=f"{files[name]}, row {number + 1}", hint=hint) from error


@contextlib.contextmanager
def muted() -> Iterator[None]:
    """Keep what lm-eval and its tasks print off stdout, which carries our result."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            yield
    finally:
        if printed.getvalue().strip():
            logger.debug("%s", printed.getvalue().strip())


def _unbuilt(name: str, error: BaseException, local: bool) -> BracesError:
    if isinstance(error, BracesError):
        return error
    kinds = {kind.__name__ for e in _chain(error) for kind in type(e).__mro__}
    if kinds & {"ImportError"}:
        return BracesError(
            f"`{name}` needs another package: {first_line(error, 300)}",
            where="--tasks",
            hint="Install the package that the message names.",
        )
    if local:
        what = f"{name} cannot read the rows: {first_line(error, 300)}"
        return DataError(what, where="--task-data", hint="Give rows with the fields of the task's own data.")
    return DataError(
        f"the data of `{name}` cannot be had: {first_line(error, 300)}",
        where="--tasks",
        hint=f"Check the network, or give a local file: --task-data {name}=FILE.",
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        yield error
        error = error.__cause__ or error.__context__


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
