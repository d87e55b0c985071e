"""A training step of the adapter against a step of LoRA and against the lower bound of such a step.

A step is forward with labels, backward, AdamW and zero_grad, on rows without padding. The floor is forward and backward
of the frozen model alone, down to the output of layer 0's FFN, where the adapter's gradient ends. LoRA's gradient
passes one more FFN and attention, which counts less the more layers there are. The first step, in which the adapter
computes the cached products of W_V, is warm-up.

Rows with the lengths of SST-5 and BoolQ in batches of 16 then show the cost of padding: the share of padding as
`braces train` packs the rows, and tokens per second against batches padded to their longest row (higher is better).

    python recipes/bench/training.py [--device cuda] [--dtype bfloat16]
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from common import (
    Shape,
    can_measure_memory,
    interleave,
    medians,
    parse,
    peak,
    ratio,
    report,
    reset_peak,
    sharing_weights,
    synchroniser,
    timed,
)

LAYERS, REPEATS, MEMORY_STEPS = 4, 9, 3
SYSTEMS = ("braces", "lora", "floor")
# Mean, standard deviation, least and largest number of tokens of a row with the SmolLM2 tokenizer.
SETS = {"sst5": (23.3, 10.8, 3, 65), "boolq": (47.2, 1.9, 45, 62)}
BATCH, BATCHES = 16, 64


def step_of(system: str, shape: Shape, model: Any, device: str) -> Callable[[], None]:
    """Attach a system to `model` and return its training step."""
    import torch

    model.requires_grad_(False)
    rows = torch.randint(0, 256, (shape.rows, shape.tokens), generator=torch.Generator().manual_seed(0)).to(device)
    if system == "floor":
        # The layers before are frozen, so the flagged output is a leaf: backward ends there.
        model.model.layers[0].mlp.register_forward_hook(lambda module, args, output: output.requires_grad_())
        parameters = []
    elif system == "lora":
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=shape.rank, lora_alpha=2 * shape.rank, target_modules=["q_proj", "v_proj"])
        model = get_peft_model(model, config)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    else:
        from braces_cli.core.adapter.model import attach

        parameters = [parameter for _, parameter in attach(model, shape.rank).named_parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4) if parameters else None
    model.train()

    def step() -> None:
        model(input_ids=rows, labels=rows, use_cache=False).loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return step


def measure_times(shape: Shape, args: argparse.Namespace) -> dict[str, list[float]]:
    """Return the seconds of a step of each system, all on the same weights."""
    base, wait = shape.build(args.dtype, args.device), synchroniser(args.device)
    steps = {name: timed(step_of(name, shape, sharing_weights(base), args.device), wait) for name in SYSTEMS}
    return interleave(steps, args.repeats, args.seconds, warmup=1)


def measure_memory(shape: Shape, args: argparse.Namespace) -> dict[str, list[float]]:
    """Return the peak bytes of a step above the frozen model, each system in a fresh process."""
    # Freed memory returns to the system at once, so that resident memory is memory in use.
    allocator = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    figures = {}
    for name in ("braces", "lora"):
        order = {"shape": asdict(shape), "system": name, "dtype": args.dtype, "device": args.device}
        argv = [sys.executable, __file__, "--memory-of", json.dumps(order)]
        done = subprocess.run(argv, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | allocator)
        figures[name] = json.loads(done.stdout)
    return figures


def memory_of(order: dict[str, Any]) -> list[int]:
    """Return the peak bytes of each of some steps above the frozen model; run in a fresh process."""
    import peft  # noqa: F401  code is resident memory as well, so every system loads the same code

    import braces_cli.core.adapter.model  # noqa: F401

    shape, device = Shape(**order["shape"]), order["device"]
    model, wait = shape.build(order["dtype"], device), synchroniser(device)
    # Libraries allocate thread pools and scratch space in the first step, which belong to no system.
    bare = sharing_weights(model)
    step_of("floor", shape, bare, device)()
    del bare
    gc.collect()
    wait()
    before = reset_peak(device)
    work = step_of(order["system"], shape, model, device)
    work()  # AdamW allocates its state in the first step
    peaks = []
    for _ in range(MEMORY_STEPS):
        reset_peak(device)
        work()
        wait()
        peaks.append(peak(device) - before)
    return peaks


def batches(name: str, vocabulary: int) -> list[list[Any]]:
    """Return random examples with the lengths of a set, in the order of training, `BATCH` at a time."""
    import torch

    from braces_cli.core.models.tokenize import Encoded
    from braces_cli.data.dataset import Example
    from braces_cli.training.batching import epoch_order

    mean, spread, least, most = SETS[name]
    generator = torch.Generator().manual_seed(0)
    count = BATCH * BATCHES
    lengths = (torch.randn(count, generator=generator) * spread + mean).round().clamp(least, most).int().tolist()
    rows = []
    for length in lengths:
        ids = torch.randint(0, vocabulary, (length,), generator=generator).tolist()
        rows.append(Example(Encoded(ids, ids, False), None))
    order = epoch_order(count, 0, 0, BATCH)
    return [[rows[index] for index in order[start : start + BATCH]] for start in range(0, count, BATCH)]


def collators(model: Any) -> dict[str, Callable[[list[Any]], list[dict[str, Any]]]]:
    """Return functions from a batch to blocks: padded to the longest row, and packed and grouped as in training."""
    from braces_cli.core.models.tokenize import pad_right
    from braces_cli.training.batching import Layout, attention_cost, collate

    cost = attention_cost(model, model.config.num_hidden_layers, model.config.hidden_size)
    return {
        "padded": lambda rows: [pad_right([row.tokens for row in rows], 0)],
        "packed": lambda rows: collate(rows, Layout(True, cost), 0).blocks,
        "grouped": lambda rows: collate(rows, Layout(False), 0).blocks,
    }


def measure_padding(model: Any) -> dict[str, dict[str, list[int]]]:
    """Return padding tokens and all computed tokens of each batch, by layout and set."""
    found = {}
    for how, collate in collators(model).items():
        for name in SETS:
            parts = batches(name, 256)
            computed = [sum(block["input_ids"].numel() for block in collate(rows)) for rows in parts]
            wasted = [n - sum(len(row.tokens.ids) for row in rows) for n, rows in zip(computed, parts, strict=True)]
            found[f"{how}, {name}"] = {"wasted": wasted, "computed": computed}
    return found


def measure_packing(args: argparse.Namespace) -> dict[str, list[float]]:
    """Return the seconds of a step on rows with SST-5's lengths, padded and packed."""
    import torch

    from braces_cli.core.adapter.model import attach
    from braces_cli.training.loss import token_nll

    model = args.shape.build(args.dtype, args.device).train()
    parameters = [parameter for _, parameter in attach(model, args.shape.rank).named_parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    rows = batches("sst5", 256)[: 4 if args.quick else BATCHES]

    def make(collate: Callable[[list[Any]], list[dict[str, Any]]]) -> Callable[[], None]:
        ready = [[{k: v.to(args.device) for k, v in block.items()} for block in collate(part)] for part in rows]
        turn = itertools.cycle(ready)

        def step() -> None:
            blocks = next(turn)
            count = sum((block["labels"][:, 1:] != -100).sum() for block in blocks)
            for block in blocks:
                inputs = {name: tensor for name, tensor in block.items() if name != "labels"}
                (token_nll(model(**inputs, use_cache=False).logits, block["labels"]).sum() / count).backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    found, wait = collators(model), synchroniser(args.device)
    steps = {how: timed(make(found[how]), wait) for how in ("padded", "packed")}
    # The batches differ in length, so more repeats are needed than for one batch.
    return interleave(steps, args.repeats * 2, args.seconds / 2, warmup=1)


def main() -> None:
    args = parse(
        __doc__, LAYERS, REPEATS, lambda p: p.add_argument("--memory-of", type=json.loads, help=argparse.SUPPRESS)
    )
    if args.memory_of:
        print(json.dumps(memory_of(args.memory_of)))
        return
    memory = measure_memory(args.shape, args) if can_measure_memory(args.device) else {}
    times, packing = measure_times(args.shape, args), measure_packing(args)
    rows = measure_padding(args.shape.build(args.dtype, args.device))
    settings = {
        "shape": asdict(args.shape), "dtype": args.dtype, "device": args.device, "repeats": len(times["braces"]),
        "quick": args.quick, "lora": "peft, on q_proj and v_proj, alpha 2 r, no dropout",
        "floor": "forward and backward of the frozen model, down to the output of layer 0's FFN, no optimizer",
        "padding_share": {n: round(sum(r["wasted"]) / sum(r["computed"]), 4) for n, r in rows.items()},
        "seconds": medians(times | packing), "bytes": medians(memory),
    }  # fmt: skip
    # Median over the batches of both sets; `settings` has the share of each set.
    wasted, computed = ([n for name in SETS for n in rows[f"packed, {name}"][key]] for key in ("wasted", "computed"))
    ratios = {
        "train_step_vs_lora": ratio(times["braces"], times["lora"], 0.90),
        "train_step_vs_floor": ratio(times["braces"], times["floor"], 1.05),
        "padding_share": ratio(wasted, computed, 0.05),
        "packed_vs_padded": ratio(packing["padded"], packing["packed"], 1.3),
    }
    if memory:
        ratios["train_memory_vs_lora"] = ratio(memory["braces"], memory["lora"], 1.00)
    report(settings, ratios, args.device)


if __name__ == "__main__":
    main()
