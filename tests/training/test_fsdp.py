"""FSDP2 over gloo on two processes: `fully_shard` by decoder layer, with an adapter attached."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from braces_cli.core.adapter.model import attach
from braces_cli.core.files import write_tensors
from braces_cli.training.checkpoint import capture, restore_optimizer, restore_parameters
from tests.conftest import open_gates, tiny_model
from tests.core.method.test_reference import relative
from tests.training.workers import cli, launch, train_with_attributes

pytestmark = pytest.mark.slow

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
        first, tensors = capture(model, optimizer, schedule), adapter.tensors(in_place=False)
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
        start = {name: tensor.clone() for name, tensor in adapter.tensors(in_place=False).items()}
        logits = step(model, optimise(adapter)[0], rows)
        assert relative(found.pop("logits").float(), logits.float()) < tolerance
        trained = adapter.tensors()
        assert trained.keys() == found.keys()
        for name, tensor in trained.items():
            assert torch.allclose(found[name], tensor, atol=tolerance), name
            assert not torch.allclose(start[name], tensor, atol=1e-3), name


def through_trainer(env: dict[str, str], argv: list[str], log: Path) -> None:
    """Body of a process: `braces ARGV` under FSDP2 as accelerate sets it up on GPUs.

    On a CPU accelerate does not look whether FSDP is asked for; it is told that these are GPUs.
    """
    os.environ.update(
        {
            "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
            "FSDP_RESHARD_AFTER_FORWARD": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
            "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
        }
    )  # fmt: skip
    from accelerate import PartialState
    from accelerate.utils import DistributedType
    from torch.distributed.tensor import DTensor

    import braces_cli.training.run as checks
    from braces_cli.training.loop import Trainer

    real, capturing = PartialState.__init__, Trainer._save

    def spread(self: Any, *args: Any, **kwargs: Any) -> None:
        real(self, *args, **kwargs)
        self.distributed_type = DistributedType.MULTI_GPU

    def checked(self: Any) -> None:
        layer = self._base.model.layers[0]
        assert type(layer).__name__ == "FSDPLlamaDecoderLayer"
        assert isinstance(layer.mlp.relevance.weight, DTensor)
        capturing(self)

    PartialState.__init__, Trainer._save = spread, checked
    checks.check_launch = lambda device: None
    cli(argv, log.with_suffix(f".{env['RANK']}"), env)


def test_attributes_under_fsdp2_give_the_adapter_of_one_process(braces, model_dir, tmp_path):
    """Gates, projections and the condition MLP."""
    one, two = train_with_attributes(braces, model_dir, tmp_path, [], through_trainer)
    losses = [json.loads((folder / "run.json").read_text())["result"]["eval_loss"] for folder in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_training_under_fsdp2_gives_the_adapter_of_one_process(braces, model_dir, tmp_path):
    """Trainer and accelerate's own wrapping by decoder layer, 12 steps, and again from a checkpoint on the way."""
    rows = tmp_path / "rows.jsonl"
    words = ["good", "sad", "old", "happy"]
    lines = [{"prompt": f"the {a} film and", "completion": f" the {b} end"} for a in words for b in words]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    argv = ["train", "--model", model_dir, "--data", rows, "--eval-data", rows, "--rank", 4, "--max-steps", 12]
    argv += ["--lr", 0.01, "--device", "cpu", "--save-steps", 5, "--save-total-limit", 0, "--output-dir"]
    assert braces(*argv, tmp_path / "one", "--batch-size", 8).code == 0
    expected = load_file(tmp_path / "one" / "adapter_model.safetensors")
    two = tmp_path / "two"
    for more in ((), ("--resume",)):
        words = [str(word) for word in (*argv, two, "--batch-size", 2, "--gradient-accumulation", 2, *more)]
        assert launch(through_trainer, 2, words, tmp_path / "log.x") == [0, 0], (tmp_path / "log.0").read_text()
        found = load_file(two / "adapter_model.safetensors")
        assert found.keys() == expected.keys()
        assert all((found[name] - expected[name]).abs().max() < 1e-4 for name in expected)
        for name in ("run.json", "adapter_model.safetensors", "checkpoint-12", "checkpoint-10"):
            path = two / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
