"""Checkpoints and the record of a run.

A checkpoint is written under a temporary name, flushed to the disk and renamed to `checkpoint-N`, so a folder of that
name is complete. Its manifest, written last, holds the hash of each file, which is checked before a run is resumed.
State is stored as safetensors and JSON, without pickle; parameters are the unconstrained ones. Under FSDP2 every
process gathers the tensors and one writes them, so a run can be resumed with another number of processes.

`run.json` identifies a run: its settings, command and rows, and once it has finished its result.
"""

import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from braces_cli.core import files
from braces_cli.core.adapter.files import CONFIG_FILE
from braces_cli.core.distributed import barrier, full_tensor, gathered, is_main, rank
from braces_cli.core.errors import BracesError, ConfigError, ModelError
from braces_cli.core.schema import Count, Kind, Name, Size, read
from braces_cli.data.dataset import Counts
from braces_cli.scoring.likelihood import Likelihood
from braces_cli.training.report import CURVE_FILE, METRICS_FILE, TrainResult

# Written last: a folder without a manifest is not a complete checkpoint.
MANIFEST_FILE = "manifest.json"
PARAMETERS_FILE = "parameters.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
# Parameter groups, schedule and gradient scaler: plain numbers.
SCHEDULE_FILE = "optimizer.json"
RNG_FILE = "rng.json"
RUN_FILE = "run.json"
_NAME = re.compile(r"checkpoint-(\d+)", re.ASCII)
# Cards may be edited; nothing reads them.
_NOT_HASHED = ("README.md",)
_PARTIAL = ".checkpoint-"
_DAMAGED = "the checkpoint is damaged"
# Errors of libraries for content that they cannot load.
_REJECTED = (
    ValueError, LookupError, TypeError, AttributeError, RuntimeError, OverflowError, OSError, SafetensorError,
)  # fmt: skip
_DAMAGED_HINT = "Remove that checkpoint; --resume then continues from the previous one."


class Manifest(TypedDict):
    """`manifest.json`: the SHA-256 of each file of a checkpoint."""

    step: Count
    sha256: dict[Name, str]


_MANIFEST = Kind(Manifest, ModelError, _DAMAGED_HINT, "manifest")
_STATE: Kind[Any] = Kind(object, ModelError, _DAMAGED_HINT, "state of training")


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints in `folder`, oldest first."""
    found = folder.iterdir() if folder.is_dir() else ()
    named = [path for path in found if _NAME.fullmatch(path.name) and files.path_exists(path / MANIFEST_FILE)]
    return sorted(named, key=_step)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def newest(folder: Path) -> Path | None:
    """The complete checkpoint with the most steps."""
    return next(reversed(checkpoints(folder)), None)


def newest_intact(folder: Path) -> Path | None:
    """The newest checkpoint, each of its files compared with the manifest.

    Raises:
        ModelError: a file is missing or differs from the one written with the checkpoint.
    """
    checkpoint = newest(folder)
    if checkpoint is None:
        return None
    path = checkpoint / MANIFEST_FILE
    try:
        manifest = read(_MANIFEST, path)
        if manifest["step"] != _step(checkpoint):
            raise ModelError(f"the manifest is that of checkpoint-{manifest['step']}", where=str(path))
        for file, expected in ((checkpoint / Path(name).name, value) for name, value in manifest["sha256"].items()):
            if files.file_hash(file, ModelError) != expected:
                what = "the file is not the one that was written with this checkpoint"
                raise ModelError(what, where=str(file))
    except ModelError as error:
        before = [each.name for each in checkpoints(folder) if _step(each) < _step(checkpoint)]
        then = f"continues from {before[-1]}" if before else "starts from the beginning"
        hint = f"Remove {checkpoint}; --resume then {then}."
        raise ModelError(error.message, where=error.where, hint=hint) from error
    return checkpoint


def write_checkpoint(folder: Path, step: int, limit: int, write: Callable[[Path], object]) -> None:
    """Call `write` with a temporary folder, then rename the folder to `checkpoint-{step}`.

    Args:
        limit: number of checkpoints that are kept; 0 for all.

    Raises:
        BracesError: the disk is full or cannot be written; earlier checkpoints are unchanged.
    """
    goal = folder / f"checkpoint-{step}"
    temporary = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f"{_PARTIAL}{step}.{secrets.token_hex(4)}"
        temporary.mkdir()
        write(temporary)
        hashed = [path for path in sorted(temporary.iterdir()) if path.name not in _NOT_HASHED]
        hashes = {path.name: files.file_hash(path, ModelError) for path in hashed}
        files.write_json(temporary / MANIFEST_FILE, {"format_version": 1, "step": step, "sha256": hashes})
        for path in (*temporary.iterdir(), temporary):
            _flush(path)
        remove(goal)
        temporary.rename(goal)
        _flush(folder)
        for path in checkpoints(folder)[:-limit] if limit else ():
            remove(path)
    except (OSError, BracesError) as error:
        # `core.files` turns an OSError into a BracesError, which names the temporary file.
        reason = error if isinstance(error, OSError) else error.__cause__
        if not isinstance(reason, OSError):
            raise
        last = newest(folder)
        advice = f"{last.name} is kept; continue from it with --resume." if last else "There is no earlier checkpoint."
        what = f"cannot write the checkpoint: {reason.strerror or reason}"
        raise BracesError(what, where=str(goal), hint=f"{files.file_hint(reason)} {advice}") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def remove(path: Path) -> None:
    """Remove a checkpoint, if it exists, after renaming it: a folder of that name is always complete."""
    if path.is_dir():
        temporary = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=path.parent))
        path.rename(temporary / path.name)
        shutil.rmtree(temporary, ignore_errors=True)


def _flush(path: Path) -> None:
    """Flush a file or the entries of a folder to the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folders
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@dataclass
class Progress:
    """Cumulative counters of a run over all processes and resumed runs.

    Attributes:
        loss_sum: sum of the losses of the steps up to `logged`, the last logged one.
        seconds: time of the optimizer steps, without evaluations.
        loss_open: sum of the losses of the steps after it; `contrast_open` is its contrastive part.
        stream: counts of the rows of a stream.
    """

    step: Size
    max_steps: Size
    tokens: Count = 0
    computed: Count = 0
    seconds: float = 0.0
    loss_sum: float = 0.0
    loss_open: float = 0.0
    contrast_open: float = 0.0
    logged: Count = 0
    stream: Counts | None = None


@dataclass
class Record:
    """`run.json`: what identifies a run.

    Attributes:
        settings: everything that its outcome depends on, by option name.
        command: words of the command line.
        data: hashes of everything that is read, by option; of a stream, of its first examples.
        base: likelihood of the evaluation rows under the base.
        progress: counters at a checkpoint.
        result: of a finished run.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    command: list[str] = field(default_factory=list)
    data: dict[str, str | None] = field(default_factory=dict)
    base: Likelihood | None = None
    progress: Progress | None = None
    result: TrainResult | None = None

    def write(self, folder: Path) -> None:
        files.write_json(folder / RUN_FILE, files.finite(asdict(self)))


_RECORD = Kind(Record, ModelError, "Give another --output-dir, or --overwrite.", "record of a run", closed=True)


def read_record(folder: Path) -> Record | None:
    """The record in `folder`, None if there is none.

    Raises:
        ModelError: the file is damaged.
    """
    path = folder / RUN_FILE
    return read(_RECORD, path) if files.path_exists(path) else None


def read_progress(checkpoint: Path) -> Progress:
    """The counters of a checkpoint.

    Raises:
        ModelError: damaged, or of another step than its folder is named after.
    """
    path = checkpoint / RUN_FILE
    progress = read(_RECORD, path).progress
    if progress is None or progress.step != _step(checkpoint) or progress.logged > progress.step:
        raise ModelError("`progress` is not that of this checkpoint", where=str(path), hint=_DAMAGED_HINT)
    return progress


def finished(folder: Path, settings: dict[str, Any]) -> TrainResult | None:
    """Result of the finished run in `folder`, None if the run is to be started or continued.

    Raises:
        ConfigError: the run there had other settings, or the folder holds another adapter.
        ModelError: a checkpoint or the record is damaged.
    """
    checkpoint = newest_intact(folder)
    done = read_record(folder)
    for stored in filter(None, (done, read_record(checkpoint) if checkpoint else None)):
        differing = [
            f"--{name.replace('_', '-')} {_shown(settings[name])} (was {_shown(before)})"
            for name, before in stored.settings.items()
            if name in settings and settings[name] != before
        ]
        if differing:
            what = f"the run there had other settings: {', '.join(differing)}"
            raise ConfigError(what, where=str(folder), hint="Use the same ones, or start anew with --overwrite.")
    is_adapter = (folder / CONFIG_FILE).is_file()
    if done is not None and done.result is not None and is_adapter:
        done.result.resumed_from = str(folder)
        return done.result
    if done is None and checkpoint is None and is_adapter:
        hint = "Give another --output-dir, or --overwrite."
        raise ConfigError("the adapter there is not from a run that can be resumed", where=str(folder), hint=hint)
    return None


def _shown(value: Any) -> str:
    return "unset" if value is None else json.dumps(value)


def prepare_folder(folder: Path, resume: bool, record: Record) -> Path | None:
    """Remove files of an earlier run, except its adapter, or return the checkpoint to resume from. Collective.

    Args:
        record: receives the likelihood of the base on resumption.

    Raises:
        ConfigError: the checkpoint was trained on other rows, from another adapter or on another base.
        ModelError: the checkpoint is damaged.
    """
    if is_main():
        files.remove_partial_files(folder)
        for path in folder.glob(f"{_PARTIAL}*"):
            shutil.rmtree(path, ignore_errors=True)
        if not resume:
            for path in checkpoints(folder):
                remove(path)
            for name in (RUN_FILE, METRICS_FILE, CURVE_FILE):
                (folder / name).unlink(missing_ok=True)
    barrier()
    checkpoint = newest_intact(folder) if resume else None
    stored = read_record(checkpoint) if checkpoint else None
    if stored is not None:
        changed = [name.replace("_", "-") for name in record.data if stored.data.get(name) != record.data[name]]
        if changed:
            what = f"the content of --{' and --'.join(changed)} has changed since the run was started"
            hint = "Give the original content, or start anew with --overwrite."
            raise ConfigError(what, where=str(checkpoint), hint=hint)
        record.base = stored.base
    return checkpoint


def capture(model: Any, optimizer: Any, scheduler: Any, scaler: Any = None) -> dict[str, Any]:
    """Gather the state of training, as the content of its files by name. Collective."""
    stored = optimizer.state_dict()
    return {
        PARAMETERS_FILE: {name: full_tensor(p.detach()).clone() for name, p in trained(model).items()},
        OPTIMIZER_FILE: {
            f"{index}.{name}": torch.as_tensor(full_tensor(value)).clone()
            for index, entry in stored["state"].items()
            for name, value in entry.items()
        },
        SCHEDULE_FILE: {
            "groups": stored["param_groups"],
            "scheduler": scheduler.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
        },
        RNG_FILE: gathered(rng_state()),
    }


def write_state(folder: Path, state: dict[str, Any]) -> None:
    """Write what `capture` returned."""
    for name, content in state.items():
        (files.write_tensors if name.endswith(".safetensors") else files.write_json)(folder / name, content)


def trained(model: Any) -> dict[str, Any]:
    """Trained parameters by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def restore_parameters(folder: Path, model: Any) -> None:
    """Copy the stored parameters into `model`, before or after it was wrapped.

    Raises:
        ModelError: the file is damaged, or from another adapter.
    """
    stored, parameters = _tensors(folder / PARAMETERS_FILE), trained(model)
    shapes = {name: tuple(p.shape) for name, p in parameters.items()}
    if shapes != {name: tuple(tensor.shape) for name, tensor in stored.items()}:
        raise ModelError("the checkpoint is of another adapter", where=str(folder), hint="Give another --output-dir.")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(_like(stored[name], parameter))


def restore_optimizer(folder: Path, optimizer: Any, scheduler: Any, scaler: Any = None) -> None:
    """Restore the moments, the rates and the position in the schedule."""
    schedule = read(_STATE, folder / SCHEDULE_FILE)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    with _restoring(folder / OPTIMIZER_FILE):
        for key, tensor in _tensors(folder / OPTIMIZER_FILE).items():
            index, _, name = key.partition(".")
            parameter = parameters[int(index)]
            # A step count has no shape.
            moment = _like(tensor, parameter) if tensor.ndim else tensor
            state.setdefault(int(index), {})[name] = moment
    with _restoring(folder / SCHEDULE_FILE):
        optimizer.load_state_dict({"state": state, "param_groups": schedule["groups"]})
        scheduler.load_state_dict(schedule["scheduler"])
        if scaler is not None and schedule["scaler"] is not None:
            scaler.load_state_dict(schedule["scaler"])


def _like(tensor: Tensor, parameter: Any) -> Tensor:
    """`tensor` on the device of `parameter`, and sharded like it."""
    tensor = tensor.to(parameter.device)
    if not hasattr(parameter, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements)


def rng_state() -> dict[str, str | None]:
    """State of torch's random generators of this process in hexadecimal digits."""
    states = {"torch": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None}
    return {name: None if state is None else state.numpy().tobytes().hex() for name, state in states.items()}


def restore_rng(folder: Path) -> None:
    """Set the random generators of this process, unless the checkpoint was written by fewer processes."""
    path = folder / RNG_FILE
    states = read(_STATE, path)
    with _restoring(path):
        if rank() < len(states):
            state = states[rank()]
            torch.set_rng_state(torch.frombuffer(bytearray.fromhex(state["torch"]), dtype=torch.uint8))
            if torch.cuda.is_available() and state["cuda"] is not None:
                torch.cuda.set_rng_state(torch.frombuffer(bytearray.fromhex(state["cuda"]), dtype=torch.uint8))


@contextmanager
def _restoring(path: Path) -> Iterator[None]:
    """Report a library that rejects the content of `path` as a damaged checkpoint."""
    try:
        yield
    except _REJECTED as error:
        raise ModelError(_DAMAGED, where=str(path), hint=_DAMAGED_HINT) from error


def _tensors(path: Path) -> dict[str, Tensor]:
    files.check_regular(path, ModelError, _DAMAGED_HINT, "file of the checkpoint")
    with _restoring(path):
        return load_file(path)
