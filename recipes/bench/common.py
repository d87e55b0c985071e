"""Shared by all benchmarks: shapes, models, interleaved measurement, ratios with quartiles, one JSON document on
stdout.

The systems take turns, in an order that changes with each repeat, and each ratio is formed within a repeat. A change of
the machine's load or clock rate then affects both sides of a ratio."""

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
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Without byte code on disk each process would compile an editable install again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

LEAST_REPEATS = 7
# For measurements of minutes: short disturbances average out within one of them.
LEAST_OF_MINUTES = 3
# Time limit of a set of measurements, once the least number of repeats is reached.
SECONDS = 120.0
RANK = 16
# A small vocabulary: every system pays for the head, which would dilute the ratios.
VOCABULARY, HEAD, KEY_HEADS = 8192, 128, 2


@dataclass(frozen=True)
class Shape:
    """Sizes of a model, by default of 4 layers of Qwen2.5-1.5B; rank of the adapters; rows and tokens of a batch."""

    layers: int = 4
    width: int = 1536
    rank: int = RANK
    tokens: int = 256
    rows: int = 2

    @property
    def ffn(self) -> int:
        return round(self.width * 35 / 6 / 64) * 64

    @property
    def heads(self) -> int:
        return max(self.width // HEAD, 2)

    @property
    def key_width(self) -> int:
        return KEY_HEADS * (self.width // self.heads)

    @property
    def linear(self) -> int:
        """Parameters in the linear layers of a decoder layer."""
        return 2 * self.width * self.width + 2 * self.width * self.key_width + 3 * self.width * self.ffn

    def build(self, dtype: str, device: str) -> Any:
        """Build a Qwen2 with random weights."""
        return qwen2(
            dtype, device, vocab_size=VOCABULARY, hidden_size=self.width, intermediate_size=self.ffn,
            num_attention_heads=self.heads, num_key_value_heads=KEY_HEADS, num_hidden_layers=self.layers,
            max_position_embeddings=max(self.tokens, 512),
        )  # fmt: skip


TINY = Shape(layers=2, width=64, rank=4, tokens=16)


def qwen2(dtype: str, device: str, **sizes: int) -> Any:
    """Build a Qwen2 of these sizes with random weights and tied embeddings."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    rope = {"rope_type": "default", "rope_theta": 1e6}
    config = Qwen2Config(**sizes, rope_parameters=rope, rms_norm_eps=1e-6, tie_word_embeddings=True)
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        with torch.device(device):
            return Qwen2ForCausalLM(config)
    finally:
        torch.set_default_dtype(before)


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add `--model`, which takes the place of a model with random weights."""
    parser.add_argument("--model", help="folder or hub id of a model (default: random weights)")


def load(args: argparse.Namespace) -> Any:
    """Return the model of `--model` as plain transformers loads it, or one with random weights, not frozen either."""
    if args.model is None:
        return args.shape.build(args.dtype, args.device).eval()
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).to(args.device).eval()


def described(args: argparse.Namespace) -> Any:
    """Describe the model, without its path."""
    return asdict(args.shape) if args.model is None else Path(args.model).name


def parse(
    text: str,
    layers: int | None,
    repeats: int,
    add: Callable[[argparse.ArgumentParser], object] = lambda parser: None,
    least: int = LEAST_REPEATS,
) -> argparse.Namespace:
    """Parse the options of a benchmark.

    Args:
        text: description for `--help`.
        layers: default number of layers; None if whole processes are measured.
        repeats: default number of measurements of each system.
        add: adds more options.
        least: smallest number of repeats.
    """
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    quick = 1 if layers is None else 2
    parser.add_argument("--repeats", type=int, help=f"measurements of each system (default {repeats}, --quick {quick})")
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help=f"stop repeating after this time, once {least} are done"
    )
    parser.add_argument("--quick", action="store_true", help="tiny shapes; for tests, not for measurements")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
    if layers is not None:
        parser.add_argument("--layers", type=int, help=f"layers of the model (default {layers}, --quick 2)")
        parser.add_argument("--device", default="cpu", help="cpu or cuda")
        parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: float32 on cpu, else bfloat16")
    add(parser)
    args = parser.parse_args()
    args.repeats = args.repeats or (quick if args.quick else repeats)
    if args.repeats < least and not args.quick:
        parser.error(f"--repeats: at least {least} are needed for quartiles")
    if layers is not None:
        args.shape = TINY if args.quick else Shape(layers=args.layers or layers)
        args.dtype = args.dtype or ("float32" if args.device == "cpu" else "bfloat16")
        if args.threads:
            import torch

            torch.set_num_threads(args.threads)
    return args


def sharing_weights(model: Any) -> Any:
    """Copy the modules of `model` but not its weights, so that systems differ only in what is attached."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def synchroniser(device: str) -> Callable[[], None]:
    """Return a function that waits for the device."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.synchronize
    return lambda: None


def timed(work: Callable[[], object], wait: Callable[[], None] = lambda: None) -> Callable[[], float]:
    """Return a function that measures the seconds of `work`, device included."""

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
    """Run all measurements once per repeat; return their figures by name.

    Args:
        seconds: no further repeat after this time, once `least` are done.
    """
    names = list(measurements)
    start = time.perf_counter()
    figures: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(-warmup, repeats):
        first = repeat % len(names)
        # Every other round is reversed: in a rotation each system would always follow the same other system.
        for name in (names[first:] + names[:first])[:: 1 if repeat // len(names) % 2 else -1]:
            figure = measurements[name]()
            if repeat >= 0:
                figures[name].append(figure)
        if sys.stderr.isatty():
            print(f"\rrepeat {repeat + 1} of {repeats}    ", end="", file=sys.stderr, flush=True)
        if repeat + 1 >= least and time.perf_counter() - start > seconds:
            break
    return figures


def ratio(above: Sequence[float], below: Sequence[float], target: float | None) -> dict[str, Any]:
    """Return the median of the ratios of the repeats, and their quartiles."""
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    low, _, high = statistics.quantiles(ratios * 2 if len(ratios) == 1 else ratios, n=4, method="inclusive")
    return {"value": _short(statistics.median(ratios)), "target": target, "spread": [_short(low), _short(high)]}


def medians(figures: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Return the median figure of each system."""
    return {name: _short(statistics.median(values)) for name, values in figures.items()}


def can_measure_memory(device: str) -> bool:
    """Return True if the peak memory can be reset: on CUDA, and under Linux."""
    return device.startswith("cuda") or os.access("/proc/self/clear_refs", os.W_OK)


def reset_peak(device: str) -> int:
    """Reset the peak memory; return the bytes in use."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _resident("VmRSS")


def peak(device: str) -> int:
    """Return the largest number of bytes in use since `reset_peak`."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated()
    return _resident("VmHWM")


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def report(settings: dict[str, Any], ratios: dict[str, dict[str, Any]], device: str = "cpu") -> None:
    """Print the JSON document of a benchmark."""
    settings = settings | {"value_is": "median of the ratios within a repeat", "spread_is": "their quartiles"}
    json.dump({"machine": machine(device), "settings": settings, "ratios": ratios}, sys.stdout, indent=2)
    print()


def machine(device: str = "cpu") -> dict[str, Any]:
    """Describe the machine without paths, host or user names."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    found: dict[str, Any] = {
        "system": platform.system(),
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": platform.python_version(),
        # A load above the number of cores widens every spread.
        "load_average": _short(os.getloadavg()[0]) if hasattr(os, "getloadavg") else None,
    }
    found |= {name: version(name) for name in ("torch", "transformers", "peft")}
    if "torch" in sys.modules:
        import torch

        found["threads"] = torch.get_num_threads()
        if device.startswith("cuda"):
            found["gpu"] = torch.cuda.get_device_name()
    return found


def _short(number: float) -> float:
    return float(f"{number:.4g}")
