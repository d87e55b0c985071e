"""A training step of the adapter against LoRA and the floor, by depth, width, rank and tokens of a row.

One axis varies around 4 layers of Qwen2.5-1.5B. The systems are those of `training.py`, at equal rank. Each ratio is
printed with the ratio of floating-point operations: of the base P in the linear layers of a decoder layer and 2 T d in
its attention per token (T tokens of a row), forward and backward; of the adapter 12 d r per token and 4 d^2 r per step
in each layer; of LoRA on the query and value projections 6 r (2 d + d_q + d_v) per token, and the backward pass of
layer 0, which the other systems do not need. A larger measured ratio is due to memory traffic and launches.

    python recipes/bench/scaling.py --plot scaling.png [--axis layers] [--device cuda] [--memory 24]
"""

from __future__ import annotations

import argparse
import gc
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from common import LEAST_REPEATS, TINY, VOCABULARY, Shape, can_measure_memory, medians, parse, ratio, report
from training import measure_memory, measure_times

AXES: dict[str, tuple[int, ...]] = {
    "layers": (4, 8, 16, 28),
    "width": (256, 512, 1024, 2048, 4096),
    "rank": (4, 8, 16, 32, 64),
    "tokens": (128, 256, 512, 1024, 2048),
}
# Weights, activations, gradients and products of W_V, as a multiple of the weights.
OVERHEAD = 2.6


def operations(shape: Shape) -> dict[str, float]:
    """Return the floating-point operations of a step of each system."""
    count, d, r, depth = shape.rows * shape.tokens, shape.width, shape.rank, shape.layers
    forward = 2 * shape.linear + 4 * shape.tokens * d
    backward = 2 * shape.linear + 8 * shape.tokens * d
    floor = count * (depth * forward + (depth - 1) * backward + 4 * VOCABULARY * d)
    lora = count * (backward + depth * 6 * r * (3 * d + shape.key_width))
    return {"floor": floor, "braces": floor + depth * (12 * d * r * count + 4 * d * d * r), "lora": floor + lora}


def measure(shape: Shape, args: argparse.Namespace) -> dict[str, Any]:
    """Return the ratios of time and memory for one shape, with the ratios of operations."""
    times, counted = measure_times(shape, args), operations(shape)
    gc.collect()
    found: dict[str, Any] = {"shape": asdict(shape), "seconds": medians(times)}
    for name in ("lora", "floor"):
        measured = ratio(times["braces"], times[name], None)
        found[f"step_vs_{name}"] = {**measured, "operations": counted["braces"] / counted[name]}
    if can_measure_memory(args.device) and not args.no_memory:
        peaks = measure_memory(shape, args)
        found["memory_vs_lora"] = ratio(peaks["braces"], peaks["lora"], None)
    return found


def draw(axes: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Plot the ratios to LoRA above those to the floor, one column per axis; operations as dashed lines."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(axes), 6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, len(axes), squeeze=False, sharey="row")
    for column, (axis, found) in enumerate(axes.items()):
        names = [str(each["shape"][axis]) for each in found]
        for row, (key, label) in enumerate((("step_vs_lora", "step / LoRA's"), ("step_vs_floor", "step / no adapter"))):
            panel = panels[row][column]
            values = [each[key]["value"] for each in found]
            low, high = ([abs(each[key]["spread"][end] - each[key]["value"]) for each in found] for end in (0, 1))
            panel.errorbar(names, values, yerr=[low, high], fmt="o-", capsize=3, label="measured")
            panel.plot(names, [each[key]["operations"] for each in found], "--", label="operations")
            panel.axhline(1, color="grey", linewidth=0.5)
            panel.set_xlabel(axis)
            panel.set_ylabel(label if column == 0 else "")
    panels[0][0].legend()
    figure.savefig(path)


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--axis", choices=AXES, action="append", help="repeatable (default: all)")
    parser.add_argument("--memory", type=float, default=24, help="GiB; larger shapes are skipped (default 24)")
    parser.add_argument("--no-memory", action="store_true", help="measure time only")
    parser.add_argument("--plot", type=Path, help="PNG file of the ratios")


def main() -> None:
    args = parse(__doc__, 4, LEAST_REPEATS, options)
    axes: dict[str, list[dict[str, Any]]] = {}
    measured: dict[Shape, dict[str, Any]] = {}
    skipped = []
    for axis in args.axis or (["layers"] if args.quick else AXES):
        axes[axis] = []
        for value in (1, 2) if args.quick else AXES[axis]:
            shape = replace(TINY if args.quick else args.shape, **{axis: value})
            weights = 2 * (shape.layers * shape.linear + VOCABULARY * shape.width)
            if OVERHEAD * weights > args.memory * 2**30:
                skipped.append(asdict(shape))
                continue
            # The shape in the middle of all axes is measured once.
            measured[shape] = measured.get(shape) or measure(shape, args)
            axes[axis].append(measured[shape])
    if args.plot:
        draw({axis: found for axis, found in axes.items() if found}, args.plot)
    ratios = {
        f"{name}, {axis} {each['shape'][axis]}": {key: each[name][key] for key in ("value", "target", "spread")}
        for axis, found in axes.items()
        for each in found
        for name in ("step_vs_lora", "step_vs_floor", "memory_vs_lora")
        if name in each
    }
    settings = {
        "shape": asdict(args.shape), "dtype": args.dtype, "device": args.device, "skipped": skipped,
        "repeats": args.repeats, "quick": args.quick, "shapes": list(measured.values()),
    }  # fmt: skip
    report(settings, ratios, args.device)


if __name__ == "__main__":
    main()
