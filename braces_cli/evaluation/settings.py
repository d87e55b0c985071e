"""What to measure and how, and everything that can be said of it before a task is built or a model loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from braces_cli.core.utils.errors import ConfigError
from braces_cli.evaluation import native_tasks, task_catalog
from braces_cli.evaluation.lm_eval_runner import SEEDS
from braces_cli.evaluation.native_task import Generation
from braces_cli.evaluation.task_data_files import check_needed, find_files
from braces_cli.evaluation.task_rows import check_fields, read_task_rows
from braces_cli.evaluation.thresholds import Threshold, check_tasks, parse_thresholds


@dataclass(frozen=True)
class EvalSettings:
    """What to measure and how.

    Attributes:
        tasks: names, each one or several with commas between them.
        task_data: `NAME=FILE` values, or `NAME=FOLDER`.
        limit: documents of each task, from the front; None for all.
        num_fewshot: examples in front of each document; None is the task's own number.
        batch_size: sequences a forward pass, or `auto`; halved where memory does not suffice.
        seed: of every random choice; None takes lm-eval's own seeds.
        base: measure the bare base, too.
        task_data_dir: folder whose files and folders are called as the tasks.
        chat_template: put prompts into the tokenizer's chat template; None is as the adapters were trained.
        fail_under: `TASK:METRIC=VALUE` values that each adapter must reach.
        generation: for tasks that write texts.
    """

    tasks: Sequence[str]
    task_data: Sequence[str] = ()
    limit: int | None = None
    num_fewshot: int | None = None
    batch_size: int | str = 8
    seed: int | None = None
    base: bool = True
    task_data_dir: Path | None = None
    chat_template: bool | None = None
    fail_under: Sequence[str] = ()
    generation: Generation = field(default_factory=Generation)
    thresholds: Sequence[Threshold] = field(init=False, default=())

    def __post_init__(self) -> None:
        size = self.batch_size
        if size != "auto" and not (isinstance(size, int) and size >= 1):
            raise ConfigError(f"`{size}` is no batch size", where="--batch-size", hint="Give 1 or more, or auto.")
        if self.limit is not None and self.limit < 1:
            hint = "Give 1 or more documents, or leave --limit out for all."
            raise ConfigError(f"a limit of {self.limit} leaves nothing to measure", where="--limit", hint=hint)
        object.__setattr__(self, "thresholds", parse_thresholds(self.fail_under))

    @property
    def seeds(self) -> dict[str, int]:
        return dict(SEEDS) if self.seed is None else dict.fromkeys(SEEDS, self.seed)


def check_settings(settings: EvalSettings) -> tuple[task_catalog.Selection, dict[str, Path], dict[str, Sequence[Any]]]:
    """Resolve the tasks and read and check every local file; loads no model and fetches nothing.

    Returns:
        The selection, task -> file, and task -> its rows (documents for our own tasks).

    Raises:
        ConfigError: an unknown task, task data for none of them, no data where a task has none of its own.
        DataError: a file that is missing, broken or lacks fields.
    """
    selection = task_catalog.select(settings.tasks)
    check_tasks(settings.thresholds, selection)
    files = find_files(selection, settings.task_data, settings.task_data_dir)
    check_needed(selection, files, task_catalog.LOCAL_ONLY)
    rows: dict[str, Sequence[Any]] = {}
    for name, file in files.items():
        if name in native_tasks.TASKS:
            rows[name] = native_tasks.TASKS[name].read(file)
        else:
            rows[name] = read_task_rows(file)
            check_fields(name, rows[name])
    return selection, files, rows
