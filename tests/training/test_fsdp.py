"""FSDP2 over gloo on two processes: `fully_shard` by decoder layer, with an adapter attached."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from braces_cli.core.adapter import attach
from braces_cli.core.files import write_tensors
from braces_cli.training.state import capture, restore_optimizer, restore_parameters
from tests.conftest import open_gates, tiny_model
from tests.core.test_reference import relative
from tests.training.workers import launch

RANK = 4
DTYPES = (torch.float32, torch.bfloat16)


def build(dtype: torch.dtype) -> tuple[Any, Any, torch.Tensor]:
    model = tiny_model("llama", dtype).train()
    adapter = attach(model, RANK)
    open_gates(adapter)
    rows = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))
    return model, adapter, rows


def optimise(adapter: Any) -> tuple[Any, Any]:
    optimizer = torch.optim.AdamW([p for _, p in adapter.named_parameters()], lr=0.01, weight_decay=0.0)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)


def step(model: Any, optimizer: Any, rows: torch.Tensor) -> torch.Tensor:
    """One optimizer step; returns the logits before it."""
    out = model(input_ids=rows, labels=rows)
    out.loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return out.logits.detach()


def same(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> bool:
    return before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def sharded(env: dict[str, str], folder: Path) -> None:
    """Body of a process: shard, train a step, gather and save what it gave; restore what was gathered."""
    os.environ.update(env)
    from torch.distributed import barrier, destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    for dtype in DTYPES:
        model, adapter, rows = build(dtype)
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        optimizer, schedule = optimise(adapter)
        logits = step(model, optimizer, rows)
        first, tensors = capture(model, optimizer, schedule), adapter.tensors(settle=False)
        place = folder / str(dtype)
        if env["RANK"] == "0":
            write_tensors(place / "step.safetensors", {**tensors, "logits": logits})
            first.write(place)
        barrier()
        step(model, optimizer, rows)
        second = capture(model, optimizer, schedule)
        restore_parameters(place, model)
        restore_optimizer(place, optimizer, schedule)
        again = capture(model, optimizer, schedule)
        assert same(first.parameters, again.parameters)
        assert same(first.optimizer, again.optimizer)
        step(model, optimizer, rows)
        again = capture(model, optimizer, schedule)
        assert same(second.parameters, again.parameters)
        assert not same(first.parameters, again.parameters)
    destroy_process_group()


def test_a_sharded_model_trains_the_adapter_of_a_whole_one(tmp_path):
    """Same logits, same adapter after a step, gathered and saved; and checkpoints go into the pieces and out again."""
    assert launch(sharded, 2, tmp_path) == [0, 0]
    for dtype, tolerance in zip(DTYPES, (1e-5, 3e-2), strict=True):
        found = load_file(tmp_path / str(dtype) / "step.safetensors")
        model, adapter, rows = build(dtype)
        start = {name: tensor.clone() for name, tensor in adapter.tensors(settle=False).items()}
        logits = step(model, optimise(adapter)[0], rows)
        assert relative(found.pop("logits").float(), logits.float()) < tolerance
        trained = adapter.tensors()
        assert trained.keys() == found.keys()
        for name, tensor in trained.items():
            assert torch.allclose(found[name], tensor, atol=tolerance), name
            assert not torch.allclose(start[name], tensor, atol=1e-3), name
