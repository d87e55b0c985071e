"""What the benchmarks share: shapes, interleaved measurement, ratios with their spread, one JSON document on stdout.

Systems are never measured one after the other but in turns, in an order that moves on with each repeat, and each ratio
is formed within a repeat: what another job or the clock rate does to the machine then falls on both sides of a ratio.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Where nothing compiled may be kept, each process would compile an editable install anew: no user's processes do.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

LEAST_REPEATS = 7
# Of what takes a minute or more: what disturbs a step by a tenth does not disturb thousands of them.
LEAST_OF_MINUTES = 3
# After so long a set of measurements stops at the least number of repeats: a busy machine gets fewer, not hours.
SECONDS = 120.0

# One layer of Qwen2.5-1.5B. The vocabulary is small so that the head, which every system pays, dilutes no ratio.
QWEN_LAYER = {
    "vocab_size": 8192,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}
TINY_LAYER = QWEN_LAYER | {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}


def parse(text: str, layers: int | None, repeats: int, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Options of a benchmark.

    Args:
        text: what the benchmark measures, for `--help`.
        layers: how many layers the model has unless told otherwise; None where whole processes are measured.
        repeats: how often each system is measured unless told otherwise.
    """
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    quick = 1 if layers is None else 2
    parser.add_argument("--repeats", type=int, help=f"measurements of each system (default {repeats}, --quick {quick})")
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help="no further repeat after so long, once 7 are done"
    )
    parser.add_argument("--quick", action="store_true", help="tiny shapes: shows that it runs, measures nothing")
    if layers is not None:
        parser.add_argument("--layers", type=int, help=f"layers of the model (default {layers}, --quick 2)")
        parser.add_argument("--device", default="cpu", help="cpu or cuda")
        parser.add_argument(
            "--threads", type=int, help="threads on the CPU: fewer than its cores where others use it too"
        )
        parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: float32 on cpu, else bfloat16")
        # How a benchmark asks a fresh process of itself for one system's memory.
        parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.repeats = args.repeats or (quick if args.quick else repeats)
    if args.repeats < LEAST_REPEATS and not args.quick:
        parser.error(f"--repeats: fewer than {LEAST_REPEATS} say nothing about spread")
    if layers is not None:
        args.layers = args.layers or (2 if args.quick else layers)
        args.dtype = args.dtype or ("float32" if args.device == "cpu" else "bfloat16")
        if args.threads:
            import torch

            torch.set_num_threads(args.threads)
    return args


def build_model(args: argparse.Namespace) -> Any:
    """A Qwen2 of `args.layers` layers with random frozen weights on `args.device`."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    shape = TINY_LAYER if args.quick else QWEN_LAYER
    rope = {"rope_type": "default", "rope_theta": 1e6}
    config = Qwen2Config(**shape, num_hidden_layers=args.layers, rope_parameters=rope)
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, args.dtype))
    try:
        with torch.device(args.device):
            model = Qwen2ForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return model.requires_grad_(False)


def twin(model: Any) -> Any:
    """A second model over the very same weights, so that systems differ in nothing but what is attached to them."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def synchroniser(device: str) -> Callable[[], None]:
    """What waits until the device has done all that was asked of it."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.synchronize
    return lambda: None


def timed(work: Callable[[], object], wait: Callable[[], None] = lambda: None) -> Callable[[], float]:
    """A measurement: seconds that `work` takes, with whatever the device still owes."""

    def measure() -> float:
        wait()
        start = time.perf_counter()
        work()
        wait()
        return time.perf_counter() - start

    return measure


def interleave(
    measurements: Mapping[str, Callable[[], float]],
    repeats: int,
    seconds: float = SECONDS,
    warmup: int = 2,
    least: int = LEAST_REPEATS,
) -> dict[str, list[float]]:
    """Figures of each measurement, one a repeat, all of them in each repeat, each time starting with another one.

    Args:
        seconds: no further repeat after so long, once `least` are done.
    """
    names = list(measurements)
    start = time.perf_counter()
    figures: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(-warmup, repeats):
        first = repeat % len(names)
        # Every other round runs backwards: with a rotation alone each system would always follow the same one.
        order = (names[first:] + names[:first])[:: 1 if repeat // len(names) % 2 else -1]
        for name in order:
            figure = measurements[name]()
            if repeat >= 0:
                figures[name].append(figure)
        _progress(f"repeat {repeat + 1} of {repeats}" if repeat >= 0 else "warm-up")
        if repeat + 1 >= least and time.perf_counter() - start > seconds:
            break
    return figures


def ratio(above: Sequence[float], below: Sequence[float], target: float | None) -> dict[str, Any]:
    """Median of the ratios, one for each repeat, and the quartiles around it."""
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    # Of one repeat there are no quartiles.
    low, _, high = statistics.quantiles(ratios * 2 if len(ratios) == 1 else ratios, n=4, method="inclusive")
    return {"value": _short(statistics.median(ratios)), "target": target, "spread": [_short(low), _short(high)]}


def medians(figures: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Median figure of each system."""
    return {name: _short(statistics.median(values)) for name, values in figures.items()}


def report(settings: dict[str, Any], ratios: dict[str, dict[str, Any]], device: str = "cpu") -> None:
    """Print the one JSON document of a benchmark."""
    settings = settings | {"value_is": "median of the ratios within a repeat", "spread_is": "their quartiles"}
    json.dump({"machine": machine(device), "settings": settings, "ratios": ratios}, sys.stdout, indent=2)
    print()


def machine(device: str = "cpu") -> dict[str, Any]:
    """What the figures depend on and what names nobody: no path, no host, no user."""
    found: dict[str, Any] = {
        "system": platform.system(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory": _memory(),
        "python": platform.python_version(),
        # More than the cores busy with something else widens every spread below.
        "load_average": _short(os.getloadavg()[0]) if hasattr(os, "getloadavg") else None,
    }
    found |= {name: version(name) for name in ("torch", "transformers", "peft")}
    if "torch" in sys.modules:
        import torch

        found["threads"] = torch.get_num_threads()
        if device.startswith("cuda"):
            found["gpu"] = torch.cuda.get_device_name()
    return found


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _memory() -> int | None:
    """Bytes of main memory, where the system says."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _short(number: float) -> float:
    """Four digits: more would be noise."""
    return float(f"{number:.4g}")


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r{text:40}", end="", file=sys.stderr, flush=True)
