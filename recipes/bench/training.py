"""A training step of the adapter against one of LoRA and against the least that any such step costs.

A step is forward with labels, backward, AdamW, zero_grad, on full rows (no padding). The floor is forward and backward
of the frozen model alone, as far down as the adapter's gradient has to go: the output of layer 0's FFN. The gradient
of LoRA has to pass one FFN and the better part of an attention more, which weighs the more the fewer layers there are;
`--layers` shows by how much. The first step, in which the adapter makes the products of W_V that it keeps (see
`braces_cli.core.adapter.gram`), is warm-up: on one thread it takes 0.4 s a layer more, half a step in float32, one
and a half in bfloat16.

Rows of the lengths of SST-5 and BoolQ in batches of 16 then show what padding costs: the part of the computed tokens
that is padding as `braces train` packs them, and its tokens per second over batches that are each padded to their
longest row (higher is better). On the rows of SST-5's lengths a step of attribute training, which contrasts opposite
strengths, is then held against one without attributes.

    python recipes/bench/training.py [--relevance paper] [--device cuda] [--dtype bfloat16]
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _bench import build_model, interleave, medians, parse, ratio, report, synchroniser, timed, twin
from _rows import BATCH as ROWS_BATCH
from _rows import SETS, attribute_steppers, padding, steppers

LAYERS, REPEATS = 4, 9
RANK = 16
# Steps whose peak is taken: it varies by a thousandth, and not with what else the machine does.
MEMORY_STEPS = 3
BATCH, LENGTH = 2, 256


def braces_step(model: Any, step: Callable[..., Callable[[], None]]) -> Callable[[], None]:
    """Attach a relevance module to every FFN of `model`; return one training step."""
    from braces_cli.core.adapter.model import attach

    adapter = attach(model, RANK)
    return step(model, [parameter for _, parameter in adapter.named_parameters()])


def lora_step(model: Any, step: Callable[..., Callable[[], None]]) -> Callable[[], None]:
    """Attach LoRA to the query and value projections of `model`; return one training step."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, lora_dropout=0.0, target_modules=["q_proj", "v_proj"])
    wrapped = get_peft_model(model, config)
    return step(wrapped, [parameter for parameter in wrapped.parameters() if parameter.requires_grad])


def floor_step(model: Any, step: Callable[..., Callable[[], None]]) -> Callable[[], None]:
    """One forward and backward of the frozen `model` with nothing to train."""
    # All before it is frozen, so flagging the output makes it a leaf: backward ends there and no operation is added.
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, output: output.requires_grad_())
    return step(model, [])


# Each builds a training step of one system from a model.
SYSTEMS: dict[str, Callable[..., Callable[[], None]]] = {"braces": braces_step, "lora": lora_step, "floor": floor_step}


def stepper(args: argparse.Namespace) -> Callable[..., Callable[[], None]]:
    """What makes a training step out of a model and the parameters to train; every system gets the same rows."""
    import torch

    length = 16 if args.quick else LENGTH
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 256, (BATCH, length), generator=generator).to(args.device)

    def make(model: Any, parameters: list[Any]) -> Callable[[], None]:
        optimizer = torch.optim.AdamW(parameters, lr=1e-4) if parameters else None
        model.train()

        def step() -> None:
            model(input_ids=rows, labels=rows, use_cache=False).loss.backward()
            if optimizer is not None:
                optimizer.step()
                optimizer.zero_grad()

        return step

    return make


def measure_times(args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds a step of each system, all over the same weights."""
    base, step, wait = build_model(args), stepper(args), synchroniser(args.device)
    steps = {name: timed(make(twin(base), step), wait) for name, make in SYSTEMS.items()}
    return interleave(steps, args.repeats, args.seconds, warmup=1)


def measure_packing(args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds a step over rows of SST-5's lengths, padded and packed."""
    from braces_cli.core.adapter.model import attach

    model = build_model(args)
    parameters = [parameter for _, parameter in attach(model, RANK).named_parameters()]
    wait = synchroniser(args.device)
    steps = {name: timed(step, wait) for name, step in steppers(args, model, parameters).items()}
    # Every batch has other lengths: more repeats than of a step that is always the same.
    return interleave(steps, args.repeats * 2, args.seconds / 2, warmup=1)


def measure_attributes(args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds a step over rows of SST-5's lengths, with attributes and without."""
    wait = synchroniser(args.device)
    steps = {name: timed(step, wait) for name, step in attribute_steppers(args, build_model(args)).items()}
    return interleave(steps, args.repeats * 2, args.seconds / 2, warmup=1)


def measure_padding(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Padding over all computed tokens of a batch, of each way and set."""
    model = build_model(args)
    found = {}
    for how in ("packed", "grouped", "padded"):
        for name in SETS:
            wasted, computed = padding(model, how, name)
            found[f"{how}, {name}"] = {"wasted": wasted, "computed": computed}
    return found


def measure_memory(args: argparse.Namespace) -> dict[str, list[float]]:
    """Peak bytes of a step beyond the frozen model, each system in a process of its own."""
    # Freed memory goes back to the system at once, so that resident memory is what is really in use.
    calm = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    shape = [f"--{name}={getattr(args, name)}" for name in ("layers", "device", "dtype", "relevance")]
    figures = {}
    for name in ("braces", "lora"):
        argv = [sys.executable, __file__, "--memory-of", name, *shape, *(["--quick"] if args.quick else [])]
        done = subprocess.run(argv, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | calm)
        figures[name] = json.loads(done.stdout)
    return figures


def memory_of(args: argparse.Namespace) -> list[int]:
    """In a process of its own: peak bytes of each of some steps, beyond those that the bare model holds."""
    import peft  # noqa: F401  code counts as resident memory too, so every system loads the same

    import braces_cli.core.adapter.model  # noqa: F401

    model, step, wait = build_model(args), stepper(args), synchroniser(args.device)
    # Thread pools and scratch space of the libraries are made in the first step and belong to no system.
    bare = twin(model)
    floor_step(bare, step)()
    del bare
    gc.collect()
    wait()
    before = reset_peak(args.device)
    work = SYSTEMS[args.memory_of](model, step)
    work()  # AdamW makes its state in the first step
    peaks = []
    for _ in range(MEMORY_STEPS):
        reset_peak(args.device)
        work()
        wait()
        peaks.append(peak(args.device) - before)
    return peaks


def reset_peak(device: str) -> int:
    """Forget the peak so far; return the bytes in use."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _resident("VmRSS")


def peak(device: str) -> int:
    """Most bytes in use since `reset_peak`."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated()
    return _resident("VmHWM")


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def can_measure_memory(device: str) -> bool:
    """On the CPU the peak can be reset, and so be measured, under Linux only."""
    return device.startswith("cuda") or os.access("/proc/self/clear_refs", os.W_OK)


def main() -> None:
    args = parse(__doc__, LAYERS, REPEATS)
    if args.memory_of:
        print(json.dumps(memory_of(args)))
        return
    memory = measure_memory(args) if can_measure_memory(args.device) else None
    times = measure_times(args)
    packing, rows = measure_packing(args), measure_padding(args)
    attributes = measure_attributes(args)
    how = "torch.cuda.max_memory_allocated" if args.device.startswith("cuda") else "VmHWM of a fresh process"
    settings = {
        "layers": args.layers,
        "rows": BATCH,
        "tokens_per_row": 16 if args.quick else LENGTH,
        "dtype": args.dtype,
        "device": args.device,
        "repeats": len(times["braces"]),
        "quick": args.quick,
        "braces": f"rank {RANK} on every FFN",
        "lora": f"peft, r {RANK} on q_proj and v_proj, no dropout",
        "floor": "forward and backward of the frozen model, down to the output of layer 0's FFN, no optimizer",
        "memory": f"{how} in a step, less what the bare model held" if memory else "not measured on this system",
        "packing": f"{ROWS_BATCH} rows a batch; tokens per second, same rows packed over padded to the longest",
        "padding_share": {n: round(sum(r["wasted"]) / sum(r["computed"]), 4) for n, r in rows.items()},
        "seconds": medians(times | packing | attributes),
        "bytes": medians(memory or {}),
    }
    ratios = {
        "train_step_vs_lora": ratio(times["braces"], times["lora"], 0.90),
        "train_step_vs_floor": ratio(times["braces"], times["floor"], 1.05),
    }
    packed = [rows[f"packed, {name}"] for name in SETS]
    # Of a batch the median, over both sets; `settings` has the shares of all tokens of a set.
    wasted, computed = ([n for part in packed for n in part[key]] for key in ("wasted", "computed"))
    ratios["padding_share"] = ratio(wasted, computed, 0.05)
    ratios["attribute_vs_plain"] = ratio(attributes["attribute"], attributes["plain"], 2.1)
    ratios["packed_vs_padded"] = ratio(packing["padded"], packing["packed"], 1.3)
    if memory:
        ratios["train_memory_vs_lora"] = ratio(memory["braces"], memory["lora"], 1.00)
    report(settings, ratios, args.device)


if __name__ == "__main__":
    main()
