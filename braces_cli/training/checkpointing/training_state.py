"""What training needs to go on as if it had never stopped, as safetensors and JSON: no pickle is written or read.

Parameters are kept unconstrained, as the optimizer moves them. Under FSDP2 each tensor is gathered whole, so that every
process must capture while one writes, and a run can go on with another number of processes.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from braces_cli.core.schema import Count, Kind, check, check_is_file, read
from braces_cli.core.utils.atomic_files import write_json, write_tensors
from braces_cli.core.utils.distributed import full_tensor, gathered, rank
from braces_cli.core.utils.errors import ModelError
from braces_cli.training.checkpointing.checkpoint_folders import DAMAGED_HINT

PARAMETERS_FILE = "parameters.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
# Parameter groups, schedule and gradient scaler: plain numbers.
SCHEDULE_FILE = "optimizer.json"
RNG_FILE = "rng.json"


class Schedule(TypedDict):
    """What `optimizer.json` holds: parameter groups, and states of the schedule and the gradient scaler."""

    groups: list[dict[str, Any]]
    scheduler: dict[str, Any]
    scaler: dict[str, Any] | None


class Group(TypedDict, total=False):
    """The numbers of a parameter group that a step of the optimizer uses."""

    lr: float
    initial_lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    params: list[Count]


class Position(TypedDict, total=False):
    """Where a schedule stands."""

    last_epoch: Count
    _step_count: Count
    base_lrs: list[float]


class Generators(TypedDict):
    """State of the generators of one process; see `rng_state`."""

    python: tuple[int, list[int], float | None]
    numpy: tuple[str, list[int], float, float, float]
    torch: str
    cuda: str | None


_SCHEDULE = Kind(Schedule, ModelError, DAMAGED_HINT, "state of the optimizer")
_GROUPS = Kind(list[Group], ModelError, DAMAGED_HINT)
_POSITION = Kind(Position, ModelError, DAMAGED_HINT)
_TENSORS = Kind(object, ModelError, DAMAGED_HINT, "file of tensors")
_RNG = Kind(list[Generators], ModelError, DAMAGED_HINT, "state of the generators")


@dataclass
class Captured:
    """State of one moment, gathered from all processes."""

    parameters: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    schedule: dict[str, Any]
    rng: list[dict[str, Any]]

    def write(self, folder: Path) -> None:
        write_tensors(folder / PARAMETERS_FILE, self.parameters)
        write_tensors(folder / OPTIMIZER_FILE, self.optimizer)
        write_json(folder / SCHEDULE_FILE, self.schedule)
        write_json(folder / RNG_FILE, self.rng)


def capture(model: Any, optimizer: Any, scheduler: Any, scaler: Any = None) -> Captured:
    """Gather the state; every process must take part."""
    stored = optimizer.state_dict()
    tensors = {
        f"{index}.{name}": torch.as_tensor(full_tensor(value)).clone()
        for index, entry in stored["state"].items()
        for name, value in entry.items()
    }
    schedule = {
        "groups": stored["param_groups"],
        "scheduler": scheduler.state_dict(),
        "scaler": None if scaler is None else scaler.state_dict(),
    }
    parameters = {name: full_tensor(p.detach()).clone() for name, p in trained(model).items()}
    return Captured(parameters, tensors, schedule, gathered(rng_state()))


def trained(model: Any) -> dict[str, Any]:
    """The parameters that learn, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def restore_parameters(folder: Path, model: Any) -> None:
    """Fill in what `capture` found, before or after the model was wrapped.

    Raises:
        ModelError: unreadable, or of another model.
    """
    stored, own = _tensors(folder / PARAMETERS_FILE), trained(model)
    shapes = {name: tuple(p.shape) for name, p in own.items()}
    if shapes != {name: tuple(tensor.shape) for name, tensor in stored.items()}:
        raise ModelError("the checkpoint is of another adapter", where=str(folder), hint="Give another --output-dir.")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(_like(stored[name], parameter))


def restore_optimizer(folder: Path, optimizer: Any, scheduler: Any, scaler: Any = None) -> None:
    """The same for the moments, the rates and where the schedule stands."""
    schedule = read(_SCHEDULE, folder / SCHEDULE_FILE)
    check(_GROUPS, schedule["groups"], f"{folder / SCHEDULE_FILE}, groups")
    check(_POSITION, schedule["scheduler"], f"{folder / SCHEDULE_FILE}, scheduler")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    with _state_of(folder / OPTIMIZER_FILE):
        for key, tensor in _tensors(folder / OPTIMIZER_FILE).items():
            index, _, name = key.partition(".")
            parameter = parameters[int(index)]
            same = tensor.shape == parameter.shape
            if not same and tensor.ndim:  # a step count has no shape
                raise _damaged(folder / OPTIMIZER_FILE)
            state.setdefault(int(index), {})[name] = _like(tensor, parameter) if same else tensor
        if len({tuple(sorted(names)) for names in state.values()}) > 1:
            raise _damaged(folder / OPTIMIZER_FILE)
    with _state_of(folder / SCHEDULE_FILE):
        optimizer.load_state_dict({"state": state, "param_groups": schedule["groups"]})
        scheduler.load_state_dict(schedule["scheduler"])
        if scaler is not None and schedule["scaler"] is not None:
            scaler.load_state_dict(schedule["scaler"])


def _like(tensor: Tensor, parameter: Any) -> Tensor:
    """`tensor` where and how `parameter` lies, which may be in pieces."""
    tensor = tensor.to(parameter.device)
    if not hasattr(parameter, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements)


def rng_state() -> dict[str, Any]:
    """State of every generator of this process, ready for JSON."""
    version, numbers, gauss = random.getstate()
    kind, keys, *rest = np.random.get_state()
    return {
        "python": [version, list(numbers), gauss],
        "numpy": [kind, [int(key) for key in keys], *map(float, rest)],
        "torch": _hex(torch.get_rng_state()),
        "cuda": _hex(torch.cuda.get_rng_state()) if torch.cuda.is_available() else None,
    }


def restore_rng(folder: Path) -> None:
    """Set the generators of this process; one that was not there when the checkpoint was written keeps its own."""
    states = read(_RNG, folder / RNG_FILE)
    if rank() >= len(states):
        return
    state = states[rank()]
    with _state_of(folder / RNG_FILE):
        version, numbers, gauss = state["python"]
        random.setstate((version, tuple(numbers), gauss))
        kind, keys, position, has_gauss, cached = state["numpy"]
        np.random.set_state((kind, np.array(keys, dtype=np.uint32), int(position), int(has_gauss), cached))
        torch.set_rng_state(_unhex(state["torch"]))
        if torch.cuda.is_available() and state["cuda"] is not None:
            torch.cuda.set_rng_state(_unhex(state["cuda"]))


@contextmanager
def _state_of(path: Path) -> Iterator[None]:
    """Around what hands a file's content to a library: the right types, but perhaps not what the library wrote."""
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
        raise _damaged(path) from error


def _hex(state: Tensor) -> str:
    return state.numpy().tobytes().hex()


def _unhex(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)


def _tensors(path: Path) -> dict[str, Tensor]:
    check_is_file(_TENSORS, path)
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise _damaged(path) from error


def _damaged(path: Path) -> ModelError:
    return ModelError("the checkpoint is damaged", where=str(path), hint=DAMAGED_HINT)
