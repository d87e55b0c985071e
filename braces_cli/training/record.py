"""What a training run came to: what the command prints and `run.json` keeps.

`run.json`: what a run was asked to do and, once it has finished, what came of it.
"""

from __future__ import annotations

import json
from array import array
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from braces_cli.core.adapter.files import CONFIG_FILE
from braces_cli.core.distributed import barrier, is_main
from braces_cli.core.errors import ConfigError, ModelError
from braces_cli.core.files import bytes_hash, check_output_folder, finite, path_exists, write_json
from braces_cli.core.schema import Count, Kind, Size, check, read
from braces_cli.data.dataset import Counts, Examples, Stream
from braces_cli.training.checkpoint import (
    DAMAGED_HINT,
    checkpoints,
    incomplete_checkpoints,
    newest_intact,
    remove,
    remove_partial,
    warn_incomplete,
)
from braces_cli.training.report import CURVE_FILE, METRICS_FILE


@dataclass(frozen=True)
class TrainResult:
    """What a run gave: the keys of `braces train --format json`.

    Times in seconds, memory in bytes, None where not measured. `rows_truncated` were cut to the maximum length and
    `rows_dropped` had no token to score; of a stream, all that were read. `side_path_share`: in the end, in each
    layer, the median norm of what the adapter adds over that of the FFN's output. `padding_share`: the part of the
    computed tokens that was padding; `packed`: several examples a row.
    """

    output_dir: str
    method: str
    trainable_parameters: int
    condition_parameters: int
    total_parameters: int
    trainable_percent: float
    steps: int
    epochs: float | None
    train_loss: float
    base_eval_loss: float | None
    base_eval_perplexity: float | None
    base_eval_perplexity_without_eos: float | None
    eval_loss: float | None
    eval_perplexity: float | None
    eval_perplexity_without_eos: float | None
    seconds: float
    tokens: int
    tokens_per_second: float
    peak_memory: int
    rows: int
    rows_truncated: int
    rows_dropped: int
    side_path_share: list[float] | None
    packed: bool
    padding_share: float
    resumed_from: str | None = None


RUN_FILE = "run.json"


class BaseLikelihood(TypedDict):
    """See `scoring.likelihood.Likelihood`."""

    nll: float
    tokens: Count
    end_nll: float
    end_tokens: Count


class Progress(TypedDict):
    """Counters that go on where a run does; see `Trainer.progress`."""

    step: Size
    max_steps: Size
    tokens: Count
    computed: Count
    seconds: float
    loss_sum: float
    loss_open: float
    logged: Count
    stream: NotRequired[Counts]


@dataclass
class Record:
    """What identifies a run.

    Attributes:
        settings: all that its outcome depends on, by the name of the option.
        command: the words it was started with.
        data: see `digest`.
        base: likelihood of the evaluation rows under the bare base.
        progress: counters that go on where the run does.
        result: of a finished run.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    command: list[str] = field(default_factory=list)
    data: str | None = None
    base: BaseLikelihood | None = None
    progress: dict[str, Any] = field(default_factory=dict)
    result: dict[str, Any] | None = None

    def write(self, folder: Path) -> None:
        write_json(folder / RUN_FILE, finite(vars(self)))


_RECORD = Kind(Record, ModelError, "Give another --output-dir, or --overwrite.", "record of a run", closed=True)
_RESULT = Kind(TrainResult, ModelError, "Give another --output-dir, or --overwrite.")
_PROGRESS = Kind(Progress, ModelError, DAMAGED_HINT)


def digest(examples: Examples | Stream) -> str:
    """Hash of the token ids and labels of all examples, of a stream of those at its head."""
    return bytes_hash(array("q", item.ids).tobytes() + array("q", item.labels).tobytes() for item in examples.items)


def read_record(folder: Path) -> Record | None:
    """The record in `folder`, None where there is none.

    Raises:
        ModelError: damaged.
    """
    path = folder / RUN_FILE
    if not path_exists(path):
        return None
    return read(_RECORD, path)


def read_progress(checkpoint: Path) -> Progress:
    """The counters of a checkpoint.

    Raises:
        ModelError: damaged, or of another step than its folder is named after.
    """
    path = checkpoint / RUN_FILE
    progress = check(_PROGRESS, read(_RECORD, path).progress, f"{path}, progress")
    if checkpoint.name != f"checkpoint-{progress['step']}" or progress["logged"] > progress["step"]:
        what = f"`progress` is of step {progress['step']}, logged up to {progress['logged']}"
        raise ModelError(what, where=str(path), hint=DAMAGED_HINT)
    return progress


def check_run_folder(folder: Path, *, overwrite: bool, resume: bool) -> None:
    """Check the output folder before any work.

    Raises:
        ConfigError: it cannot be written to, or holds something and neither `overwrite` nor `resume` is on; where it
            holds a run that can be resumed, the hint says so.
    """
    run = bool(checkpoints(folder)) or (folder / RUN_FILE).is_file()
    hint = "--resume continues the run there; --overwrite starts anew and removes its checkpoints."
    check_output_folder(folder, overwrite or resume, *([hint] if run else []))


def finished(folder: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """Result of the finished run in `folder`, None where there is a run to begin or to go on with.

    Raises:
        ConfigError: the run there, finished or not, had other settings, or is none of ours.
        ModelError: a checkpoint or the record is damaged.
    """
    checkpoint = newest_intact(folder)
    done = read_record(folder)
    for stored in filter(None, (done, read_record(checkpoint) if checkpoint else None)):
        check_same(stored.settings, settings, folder)
    if done is not None and done.result is not None and (folder / CONFIG_FILE).is_file():
        check(_RESULT, done.result, f"{folder / RUN_FILE}, result")
        return {**done.result, "resumed_from": str(folder)}
    if done is None and checkpoint is None and (folder / CONFIG_FILE).is_file():
        hint = "Give another --output-dir, or --overwrite."
        raise ConfigError("the adapter there is of no run that can be resumed", where=str(folder), hint=hint)
    return None


def prepare_folder(folder: Path, resume: bool, record: Record) -> Path | None:
    """Make the folder ready, and return the checkpoint to go on from, if any; every process must ask.

    Without `resume`, what an earlier run left there goes; its adapter stays until there is another one.

    Raises:
        ConfigError: that checkpoint was trained on other rows.
        ModelError: it is damaged.
    """
    if is_main():
        remove_partial(folder)
        if not resume:
            for path in checkpoints(folder):
                remove(path)
            for path in incomplete_checkpoints(folder):
                with suppress(OSError):  # it holds something
                    path.rmdir()
            for name in (RUN_FILE, METRICS_FILE, CURVE_FILE):
                (folder / name).unlink(missing_ok=True)
        else:
            warn_incomplete(folder)
    barrier()
    checkpoint = newest_intact(folder) if resume else None
    stored = read_record(checkpoint) if checkpoint else None
    if stored is not None:
        if stored.data != record.data:
            hint = "Give the same rows, or start anew with --overwrite."
            raise ConfigError("the rows are not those of the checkpoint", where=str(checkpoint), hint=hint)
        record.base = stored.base
    return checkpoint


def check_same(stored: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    """Refuse to go on with other settings, and name them all."""
    differing = [
        f"--{name.replace('_', '-')} {_shown(now[name])} (was {_shown(stored[name])})"
        for name in stored
        if name in now and now[name] != stored[name]
    ]
    if differing:
        what = f"the run there had other settings: {', '.join(differing)}"
        raise ConfigError(what, where=str(folder), hint="Use the same ones, or start anew with --overwrite.")


def _shown(value: Any) -> str:
    return "unset" if value is None else json.dumps(value)
