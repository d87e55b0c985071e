"""A training step of the adapter against LoRA and the floor as a model gets deeper and wider, and the law behind it.

One axis at a time is varied around the shape of Qwen2.5-1.5B's layers: layers, width, rank, tokens of a row; and the
same step with gradient checkpointing and with packed rows. Systems are those of `training.py`, all at the same rank.

The law counts floating-point operations: of the base P in the linear layers of a decoder layer and 2 T d in its
attention for each token (T tokens of a row), forward and backward; of the adapter 12 d r a token and 4 d^2 r a step in
each layer; of LoRA on the query and value projections 6 r (2 d + d_q + d_v) a token, and the backward pass of layer 0,
which the others do not need. `law` beside each ratio is what follows from that; what a measured ratio exceeds it by is
memory traffic and launches.

    python recipes/bench/scaling.py --plot scaling.png [--axis layers] [--device cuda] [--memory 24]
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from _bench import LEAST_REPEATS, QWEN_LAYER, SECONDS, interleave, medians, ratio, report, synchroniser, timed, twin
from training import can_measure_memory, floor_step, peak, reset_peak

AXES: dict[str, tuple[Any, ...]] = {
    "layers": (4, 8, 16, 28),
    "width": (256, 512, 1024, 2048, 4096),
    "rank": (4, 8, 16, 32, 64),
    "tokens": (128, 256, 512, 1024, 2048),
    "how": ("plain", "checkpointing", "packed"),
}
QUICK: dict[str, tuple[Any, ...]] = {"how": ("checkpointing", "packed")}
ROWS, HEAD = 2, 128
SYSTEMS = ("braces", "lora", "floor")
# Beyond the weights: activations, gradients and G of every layer, as a share of the weights.
OVERHEAD = 1.6


@dataclass(frozen=True)
class Point:
    """A shape: FFNs are as much wider than the model as Qwen's, heads have 128 channels, rows are `ROWS`."""

    layers: int = 4
    width: int = 1536
    rank: int = 16
    tokens: int = 256
    how: str = "plain"

    @property
    def ffn(self) -> int:
        return round(self.width * 35 / 6 / 64) * 64

    @property
    def heads(self) -> int:
        return max(self.width // HEAD, 2)

    @property
    def key_width(self) -> int:
        """Of keys and values, two heads as Qwen's."""
        return 2 * (self.width // self.heads)

    @property
    def linear(self) -> int:
        """Parameters in the linear layers of a decoder layer."""
        return 2 * self.width * self.width + 2 * self.width * self.key_width + 3 * self.width * self.ffn

    def weights(self) -> int:
        return self.layers * self.linear + QWEN_LAYER["vocab_size"] * self.width

    def operations(self) -> dict[str, float]:
        """Of a step, for each system."""
        count, d, r, depth = ROWS * self.tokens, self.width, self.rank, self.layers
        attended = self.tokens // 4 if self.how == "packed" else self.tokens
        layer = 2 * self.linear + 4 * attended * d
        backward = 2 * self.linear + 8 * attended * d
        head = 4 * QWEN_LAYER["vocab_size"] * d
        again = layer * depth if self.how == "checkpointing" else 0
        floor = count * (depth * layer + (depth - 1) * backward + head + again)
        lora = count * (backward + depth * 6 * r * (3 * d + self.key_width))
        return {
            "floor": floor, "braces": floor + depth * (12 * d * r * count + 4 * d * d * r), "lora": floor + lora,
        }  # fmt: skip


def build(point: Point, dtype: str, device: str) -> Any:
    """A random frozen Qwen2 of that shape."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    shape = QWEN_LAYER | {
        "hidden_size": point.width, "intermediate_size": point.ffn, "num_attention_heads": point.heads,
        "num_key_value_heads": 2, "num_hidden_layers": point.layers,
    }  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 1e6}
    config = Qwen2Config(**shape, rope_parameters=rope, max_position_embeddings=max(point.tokens, 32))
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        with torch.device(device):
            model = Qwen2ForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return model.requires_grad_(False)


def step_of(system: str, point: Point, model: Any, device: str) -> Callable[[], None]:
    """Attach a system to `model`; return one of its training steps."""
    import torch

    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 256, (ROWS, point.tokens), generator=generator).to(device)
    inputs = {"input_ids": rows, "labels": rows}
    if point.how == "packed":
        # Four examples a row: positions start anew with each.
        inputs["position_ids"] = (torch.arange(point.tokens) % (point.tokens // 4)).expand(ROWS, -1).to(device)
    checkpointing = point.how == "checkpointing"

    def make(model: Any, parameters: list[Any]) -> Callable[[], None]:
        optimizer = torch.optim.AdamW(parameters, lr=1e-4) if parameters else None
        model.train()

        def step() -> None:
            model(**inputs, use_cache=False).loss.backward()
            if optimizer is not None:
                optimizer.step()
                optimizer.zero_grad()

        return step

    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    if system == "floor":
        return floor_step(model, make)
    if system == "lora":
        from peft import LoraConfig, get_peft_model

        targets = ["q_proj", "v_proj"]
        config = LoraConfig(r=point.rank, lora_alpha=2 * point.rank, lora_dropout=0.0, target_modules=targets)
        wrapped = get_peft_model(model, config)
        return make(wrapped, [parameter for parameter in wrapped.parameters() if parameter.requires_grad])
    from braces_cli.core.adapter.model import attach

    adapter = attach(model, point.rank)
    if checkpointing:
        adapter.save_memory()
    return make(model, [parameter for _, parameter in adapter.named_parameters()])


def memory_of(point: Point, system: str, args: argparse.Namespace) -> dict[str, list[float]]:
    """Peak bytes of three steps beyond the frozen model, in a process of its own."""
    calm = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    asked = json.dumps({"point": asdict(point), "system": system, "dtype": args.dtype, "device": args.device})
    done = subprocess.run(
        [sys.executable, __file__, "--memory-of", asked], check=True, stdout=subprocess.PIPE, text=True,
        env=os.environ | calm,
    )  # fmt: skip
    peaks: dict[str, list[float]] = json.loads(done.stdout)
    return peaks


def print_memory(asked: dict[str, Any]) -> None:
    """In a process of its own: the peaks of `memory_of`, as JSON."""
    import peft  # noqa: F401  code counts as resident memory too, so every system loads the same

    import braces_cli.core.adapter.model  # noqa: F401

    point, device = Point(**asked["point"]), asked["device"]
    model, wait = build(point, asked["dtype"], device), synchroniser(device)
    bare = twin(model)
    step_of("floor", replace(point, how="plain"), bare, device)()
    del bare
    gc.collect()
    wait()
    before = reset_peak(device)
    work = step_of(asked["system"], point, model, device)
    work()
    peaks = []
    for _ in range(3):
        reset_peak(device)
        work()
        wait()
        peaks.append(peak(device) - before)
    print(json.dumps(peaks))


def measure(point: Point, args: argparse.Namespace) -> dict[str, Any]:
    """Ratios of time and memory at one shape, with what the law gives."""
    base, wait = build(point, args.dtype, args.device), synchroniser(args.device)
    steps = {name: timed(step_of(name, point, twin(base), args.device), wait) for name in SYSTEMS}
    times = interleave(steps, args.repeats, args.seconds, warmup=1)
    del steps, base
    gc.collect()
    law = point.operations()
    found: dict[str, Any] = {
        "point": asdict(point),
        "seconds": medians(times),
        "vs_lora": {**ratio(times["braces"], times["lora"], None), "law": law["braces"] / law["lora"]},
        "vs_floor": {**ratio(times["braces"], times["floor"], None), "law": law["braces"] / law["floor"]},
    }
    if can_measure_memory(args.device) and not args.no_memory:
        peaks = {name: memory_of(point, name, args) for name in ("braces", "lora")}
        found["bytes"] = medians(peaks)
        found["memory_vs_lora"] = ratio(peaks["braces"], peaks["lora"], None)
    return found


def draw(axes: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """One column an axis: above the ratio to LoRA, below that to the floor; the law dashed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(axes), 6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, len(axes), squeeze=False, sharey="row")
    for column, (axis, found) in enumerate(axes.items()):
        names = [str(each["point"][axis]) for each in found]
        for row, (key, label) in enumerate((("vs_lora", "step / LoRA's"), ("vs_floor", "step / floor"))):
            panel = panels[row][column]
            values = [each[key]["value"] for each in found]
            spread = [
                [max(each[key]["value"] - each[key]["spread"][0], 0) for each in found],
                [max(each[key]["spread"][1] - each[key]["value"], 0) for each in found],
            ]
            panel.errorbar(names, values, yerr=spread, fmt="o-", capsize=3, label="measured")
            panel.plot(names, [each[key]["law"] for each in found], "--", label="law")
            panel.axhline(1, color="grey", linewidth=0.5)
            panel.set_xlabel(axis)
            panel.set_ylabel(label if column == 0 else "")
    panels[0][0].legend()
    figure.savefig(path)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axis", choices=AXES, action="append", help="repeatable (default: all)")
    parser.add_argument("--layers", type=int, help="layers while another axis is varied (default 4)")
    parser.add_argument("--memory", type=float, default=24, help="GiB: larger shapes are left out (default 24)")
    parser.add_argument("--no-memory", action="store_true", help="measure time only")
    parser.add_argument("--plot", type=Path, help="PNG file for the ratios and the law")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--repeats", type=int, help=f"of each shape (default {LEAST_REPEATS}, --quick 2)")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of a shape, once 7 repeats are done")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: shows that it runs, measures nothing")
    parser.add_argument("--memory-of", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.repeats = args.repeats or (2 if args.quick else LEAST_REPEATS)
    if args.repeats < LEAST_REPEATS and not args.quick:
        parser.error(f"--repeats: fewer than {LEAST_REPEATS} say nothing about spread")
    if args.threads:
        import torch

        torch.set_num_threads(args.threads)
    return args


def main() -> None:
    args = parse()
    if args.memory_of:
        print_memory(args.memory_of)
        return
    base = Point(layers=1, width=64, rank=4, tokens=16) if args.quick else Point(layers=args.layers or 4)
    chosen = {axis: values for axis, values in (QUICK if args.quick else AXES).items() if axis in (args.axis or AXES)}
    measured: dict[Point, dict[str, Any]] = {}
    left_out: list[dict[str, Any]] = []
    axes: dict[str, list[dict[str, Any]]] = {axis: [] for axis in chosen}
    for axis, values in chosen.items():
        for value in values:
            point = replace(base, **{axis: value})
            if OVERHEAD * 2 * point.weights() > args.memory * 2**30:
                left_out.append(asdict(point))
                continue
            # The shape that all axes share is measured once.
            measured[point] = measured.get(point) or measure(point, args)
            axes[axis].append(measured[point])
    if args.plot:
        draw({axis: found for axis, found in axes.items() if found}, args.plot)
    ratios = {}
    for axis, found in axes.items():
        for each in found:
            place = f"{axis} {each['point'][axis]}"
            for key, target in (("vs_lora", 0.95), ("vs_floor", 1.05)):
                held = target if place == f"layers {AXES['layers'][-1]}" else None
                ratios[f"step_{key}, {place}"] = {
                    "value": each[key]["value"],
                    "target": held,
                    "spread": each[key]["spread"],
                }
            if "memory_vs_lora" in each:
                ratios[f"memory_vs_lora, {place}"] = each["memory_vs_lora"]
    settings = {
        "base": asdict(base), "rows": ROWS, "dtype": args.dtype, "device": args.device,
        "left_out": left_out, "repeats": args.repeats, "quick": args.quick, "points": list(measured.values()),
    }  # fmt: skip
    report(settings, ratios, args.device)


if __name__ == "__main__":
    main()
