"""What training needs to go on as if it had never stopped, as safetensors and JSON: no pickle is written or read.

Parameters are kept unconstrained, as the optimizer moves them. Under FSDP2 each tensor is gathered whole, so that every
process must capture while one writes, and a run can go on with another number of processes.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from braces_cli.core.utils.atomic_files import write_json, write_tensors
from braces_cli.core.utils.distributed import gathered, rank, whole
from braces_cli.core.utils.errors import ModelError

PARAMETERS_FILE = "parameters.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
# Parameter groups, schedule and gradient scaler: plain numbers.
SCHEDULE_FILE = "optimizer.json"
RNG_FILE = "rng.json"


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
        f"{index}.{name}": torch.as_tensor(whole(value)).clone()
        for index, entry in stored["state"].items()
        for name, value in entry.items()
    }
    schedule = {
        "groups": stored["param_groups"],
        "scheduler": scheduler.state_dict(),
        "scaler": None if scaler is None else scaler.state_dict(),
    }
    parameters = {name: whole(p.detach()).clone() for name, p in trained(model).items()}
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
    schedule = _json(folder / SCHEDULE_FILE)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in _tensors(folder / OPTIMIZER_FILE).items():
        index, _, name = key.partition(".")
        parameter = parameters[int(index)]
        same = tensor.shape == parameter.shape
        state.setdefault(int(index), {})[name] = _like(tensor, parameter) if same else tensor
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
    states = _json(folder / RNG_FILE)
    if rank() >= len(states):
        return
    state = states[rank()]
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), int(position), int(has_gauss), cached))
    torch.set_rng_state(_unhex(state["torch"]))
    if torch.cuda.is_available() and state["cuda"] is not None:
        torch.cuda.set_rng_state(_unhex(state["cuda"]))


def _hex(state: Tensor) -> str:
    return state.numpy().tobytes().hex()


def _unhex(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise _damaged(path) from error


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(path) from error


def _damaged(path: Path) -> ModelError:
    hint = "Remove that checkpoint; --resume then goes on from the one before."
    return ModelError("the checkpoint is damaged", where=str(path), hint=hint)
