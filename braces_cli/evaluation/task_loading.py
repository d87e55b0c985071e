"""Selected tasks -> lm-eval's task objects with their data, all of it checked before a model is loaded."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from braces_cli.core.utils.errors import BracesError, ConfigError, DataError, first_line
from braces_cli.evaluation import task_catalog

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


def load_tasks(selection: task_catalog.Selection, overrides: Path, metadata: dict[str, Any]) -> list[TaskUnit]:
    """Build the selected tasks with their data, from the hub where `overrides` holds none for them.

    Raises:
        ConfigError: a task given twice through two groups, one that runs code a model writes, or needs pictures.
        DataError: data that cannot be fetched, or that the task cannot read.
    """
    units: list[TaskUnit] = []
    seen: set[str] = set()
    manager = task_catalog.manager(selection, overrides, metadata)
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
