"""lm-eval as a library: tasks built once, measured on the model that is in memory.

`lm_eval.evaluate` is used rather than `simple_evaluate`, which collects six seconds' worth of facts about the machine
a call. What the latter does beyond that (seeds, few-shot settings) is done here, in the same order.
"""

from __future__ import annotations

import contextlib
import io
import logging
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import torch
from lm_eval.models.huggingface import HFLM

from braces_cli.core.errors import BracesError, ConfigError, DataError
from braces_cli.core.progress import Report, silent
from braces_cli.evaluation import catalog

logger = logging.getLogger("braces")

# lm-eval's own, so that without --seed a run draws the few-shot examples that lm-eval draws.
SEEDS = {"python": 0, "numpy": 1234, "torch": 1234, "fewshot": 1234}


@dataclass
class Scores:
    """What one system scored.

    Attributes:
        results: task or group -> metric -> `{value, stderr, n}`.
        documents: (task, metric) -> document id -> value, where each document has one.
        shots: task -> number of few-shot examples used.
        batch_sizes: those used; several where lm-eval chose them.
    """

    results: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    documents: dict[tuple[str, str], dict[int, float]] = field(default_factory=dict)
    shots: dict[str, int] = field(default_factory=dict)
    batch_sizes: list[int] = field(default_factory=list)


class _Model(HFLM):
    """HFLM on a model in memory, whose progress goes to a `Report` instead of bars of its own."""

    def __init__(self, model: Any, tokenizer: Any, batch_size: int | str, stage: str, report: Report) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        self._stage, self._report = stage, report

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
        with self._counted(f"{self._stage}, choices", len(requests)):
            return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
        with self._counted(f"{self._stage}, texts", len(requests)):
            return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        with self._counted(f"{self._stage}, answers", len(requests)):
            return super().generate_until(requests, disable_tqdm=True)

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


def load_tasks(selection: catalog.Selection, overrides: Path, metadata: dict[str, Any]) -> Any:
    """Build the selected tasks with their data, from the hub where `overrides` holds none for them.

    Returns:
        What `lm_eval.evaluate` takes as `task_dict`.

    Raises:
        ConfigError: a task given twice through two groups, one that runs code a model writes, or needs pictures.
        DataError: data that cannot be fetched, or that the task cannot read.
    """
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    manager = catalog.manager(selection, overrides, metadata)
    for name in selection.names:
        with _muted():
            try:
                part = manager.load([name])
            except (SystemExit, Exception) as error:
                raise _unbuilt(name, error, (overrides / f"{name}.yaml").exists()) from error
        twice = sorted(part["tasks"].keys() & loaded["tasks"].keys())
        if twice:
            raise ConfigError(f"`{twice[0]}` is in two of the groups asked for", where="--tasks", hint="Leave one out.")
        for key, found in loaded.items():
            found.update(part[key])
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise ConfigError(f"`{name}` runs code that the model writes", where="--tasks", hint="Use lm-eval for it.")
        if getattr(task, "MULTIMODAL", False):
            raise ConfigError(f"`{name}` needs more than text", where="--tasks", hint="Choose a task of text alone.")
    return loaded


def check_documents(tasks: Any, names: Sequence[str], files: dict[str, Path], limit: int | None) -> None:
    """Let each task read every document it will be asked about, before a model is loaded.

    Raises:
        DataError: a row that the task cannot read.
    """
    for name in names:
        task = tasks["tasks"][name]
        for number, doc in task.doc_iterator(limit=limit):
            try:
                task.doc_to_text(doc)
                task.doc_to_target(doc)
                if task.get_config("doc_to_choice") is not None:
                    task.doc_to_choice(doc)
            except Exception as error:
                what = f"{name} cannot read the row: {_first_line(error)}"
                found = ", ".join(map(str, doc))
                raise DataError(what, where=f"{files[name]}, row {number + 1}", hint=f"Found: {found}.") from error


def measure(
    model: Any,
    tokenizer: Any,
    tasks: Any,
    *,
    batch_size: int | str,
    limit: int | None,
    num_fewshot: int | None,
    seeds: dict[str, int],
    stage: str,
    report: Report = silent,
) -> Scores:
    """Score a model in memory, as it stands, on tasks from `load_tasks`.

    Args:
        batch_size: sequences a forward pass, or `auto`.
        limit: documents of each task, from the front; None for all.
        num_fewshot: examples in front; a task that fixes 0 keeps it, as in lm-eval.
        stage: what the progress is called.
    """
    shots = _set_up(tasks, num_fewshot, seeds)
    with _muted():
        wrapped = _Model(model, tokenizer, batch_size, stage, report)
        try:
            found = lm_eval.evaluate(lm=wrapped, task_dict=tasks, limit=limit, log_samples=True)
        except torch.OutOfMemoryError as error:
            raise BracesError("out of memory", where=stage, hint="Try a smaller --batch-size.") from error
    if found is None:
        raise BracesError("no results on this process", where=stage, hint="Run braces eval in a single process.")
    chosen = wrapped.batch_sizes.values() if batch_size == "auto" else [batch_size]
    return _collect(found, shots, sorted({int(size) for size in chosen}))


def _set_up(tasks: Any, num_fewshot: int | None, seeds: dict[str, int]) -> dict[str, int]:
    random.seed(seeds["python"])
    np.random.seed(seeds["numpy"])
    torch.manual_seed(seeds["torch"])
    shots: dict[str, int] = {}
    for name, task in tasks["tasks"].items():
        own = task.get_config("num_fewshot")
        if num_fewshot is not None and own != 0:
            task.set_config(key="num_fewshot", value=num_fewshot)
        elif own is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=seeds["fewshot"])
        shots[name] = int(task.get_config("num_fewshot") or 0)
    return shots


def _collect(found: Any, shots: dict[str, int], batch_sizes: list[int]) -> Scores:
    scores = Scores(shots=shots, batch_sizes=batch_sizes)
    labels: dict[tuple[str, str, str], str] = {}
    for task, entries in found["results"].items():
        metrics: dict[str, dict[str, Any]] = {}
        for key, value in entries.items():
            metric, sign, chosen = key.rpartition(",")
            if not sign or metric.endswith("_stderr") or not isinstance(value, Real):
                continue
            # Without lm-eval's filter, except for the second and further filters of the same metric.
            label = metric if metric not in metrics else key
            labels[task, metric, chosen] = label
            error = entries.get(f"{metric}_stderr,{chosen}")
            stderr = float(error) if isinstance(error, Real) else None
            metrics[label] = {"value": float(value), "stderr": stderr, "n": int(entries["sample_len"])}
        if metrics:
            scores.results[task] = metrics
    for task, samples in found["samples"].items():
        for sample in samples:
            for metric in sample["metrics"]:
                label, value = labels.get((task, metric, sample["filter"])), sample[metric]
                if label is not None and isinstance(value, Real):
                    scores.documents.setdefault((task, label), {})[sample["doc_id"]] = float(value)
    return scores


@contextlib.contextmanager
def _muted() -> Iterator[None]:
    """Keep what lm-eval and its tasks print off stdout, which carries our result."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            yield
    finally:
        if said.getvalue().strip():
            logger.debug("%s", said.getvalue().strip())


def _unbuilt(name: str, error: BaseException, local: bool) -> BracesError:
    if isinstance(error, BracesError):
        return error
    kinds = {kind.__name__ for e in _chain(error) for kind in type(e).__mro__}
    if kinds & {"ImportError"}:
        return BracesError(f"`{name}` needs more: {_first_line(error)}", where="--tasks", hint="Install what it names.")
    if local:
        what = f"{name} cannot read the rows: {_first_line(error)}"
        return DataError(what, where="--task-data", hint="Give rows with the fields of the task's own data.")
    return DataError(
        f"the data of `{name}` cannot be had: {_first_line(error)}",
        where="--tasks",
        hint=f"Check the network, or give a local file: --task-data {name}=FILE.",
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        yield error
        error = error.__cause__ or error.__context__


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
