"""Mapping value vectors onto a vocabulary against a plain matrix product, and against one vector at a time.

python recipes/bench/inspection.py [--device cuda] [--threads 2]

map_vs_gemm   rate of a map over that of a plain product of the same dtype, in flops a second
map_vs_loop   rate of a map over that of LM head, norm and topk for one vector after another
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _bench import interleave, medians, parse, ratio, report, synchroniser

REPEATS = 7
VECTORS, WIDTH, VOCABULARY, TOP_K = 2048, 1536, 151_936, 10
QUICK = (64, 64, 1000, 10)
# Of the plain product in one measurement: a share of the map's, for the whole would take as long again.
GEMM_TOKENS = 4096
LOOP = 4
DTYPES = ("float32", "bfloat16")


def head(args: argparse.Namespace, dtype: str) -> Any:
    """A model of one layer whose norm and head have the shapes wanted, and the vectors to map."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    vectors, width, vocabulary, _ = QUICK if args.quick else (VECTORS, WIDTH, VOCABULARY, TOP_K)
    rope = {"rope_type": "default", "rope_theta": 1e6}
    config = Qwen2Config(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=vectors, num_hidden_layers=1,
        num_attention_heads=width // 64, num_key_value_heads=1, tie_word_embeddings=True, rope_parameters=rope,
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    torch.manual_seed(0)
    try:
        with torch.device(args.device):
            return Qwen2ForCausalLM(config).requires_grad_(False).eval()
    finally:
        torch.set_default_dtype(before)


def rates(args: argparse.Namespace, model: Any, part: int) -> tuple[dict[str, Callable[[], float]], float | None]:
    """Measurements of flops a second, and the bytes that a map of all vectors takes at its peak above the model."""
    import torch

    from braces_cli.core.models.ffn import find_ffns
    from braces_cli.inspection.vocabulary import LogitLens

    wait = synchroniser(args.device)
    matrix = find_ffns(model)[0].value_matrix().mT
    lens, weight = LogitLens(model), model.get_output_embeddings().weight
    k, vocabulary = TOP_K, len(weight)
    width = weight.shape[1]

    def rate(work: Callable[[], object], vectors: int, tokens: int) -> Callable[[], float]:
        def measure() -> float:
            wait()
            start = time.perf_counter()
            work()
            wait()
            return 2.0 * vectors * tokens * width / (time.perf_counter() - start)

        return measure

    hidden = torch.randn(len(matrix), width, device=weight.device).to(weight.dtype)
    rows = min(GEMM_TOKENS, vocabulary)
    # bfloat16 may be eight times slower than float32 on a CPU without instructions for it: fewer rows tell as much.
    gemm_rows = rows // 4 if args.device == "cpu" and weight.dtype == torch.bfloat16 else rows
    block = weight[:gemm_rows].clone()
    some = matrix[:part]

    def loop() -> None:
        for vector in matrix[:LOOP]:
            lens(vector[None]).topk(k)

    with torch.no_grad():
        taken = peak_above(lambda: lens.best(matrix, k), args.device)
    return {
        "map": rate(lambda: lens.best(some, k), len(some), vocabulary),
        "gemm": rate(lambda: hidden @ block.mT, len(hidden), len(block)),
        "loop": rate(loop, LOOP, vocabulary),
    }, taken


def peak_above(work: Callable[[], object], device: str) -> float | None:
    """Bytes at the peak of `work` above what there was before; None where the system cannot tell."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return float(torch.cuda.max_memory_allocated() - before)
    reset, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if not reset.exists():
        return None

    def kibibytes(name: str) -> float:
        lines = status.read_text(encoding="utf-8").splitlines()
        return float(next(line for line in lines if line.startswith(name)).split()[1])

    reset.write_text("5", encoding="utf-8")  # from here on VmHWM counts anew
    before = kibibytes("VmRSS")
    work()
    return 1024 * (kibibytes("VmHWM") - before)


def main() -> None:
    args = parse(__doc__, 1, REPEATS)
    import torch

    part = VECTORS if args.device != "cpu" else VECTORS // 8
    figures: dict[str, dict[str, list[float]]] = {}
    memory = {}
    with torch.no_grad():
        # One after the other: two such heads at once would only fill the memory. Each ratio is within one of them.
        for dtype in DTYPES:
            model = head(args, dtype)
            measurements, memory[dtype] = rates(args, model, part)
            figures[dtype] = interleave(measurements, args.repeats, seconds=args.seconds / 3, warmup=1)
            del model, measurements
    ratios = {}
    for dtype in DTYPES:
        name = "" if dtype == "float32" else f"_{dtype}"
        ratios[f"map_vs_gemm{name}"] = ratio(figures[dtype]["map"], figures[dtype]["gemm"], 0.70)
        ratios[f"map_vs_loop{name}"] = ratio(figures[dtype]["map"], figures[dtype]["loop"], None)
    vectors, width, vocabulary, k = QUICK if args.quick else (VECTORS, WIDTH, VOCABULARY, TOP_K)
    settings = {
        "vectors": vectors,
        "vectors_in_one_measurement": min(part, vectors),
        "hidden_size": width,
        "vocabulary": vocabulary,
        "top_k": k,
        "device": args.device,
        "repeats": [len(figures[dtype]["map"]) for dtype in DTYPES],
        "quick": args.quick,
        "flops_per_second": {dtype: medians(figures[dtype]) for dtype in DTYPES},
        "peak_memory_above_model": memory,
        "peak_memory_target": 2 * 1024**3,
        "map_seconds_all_vectors": {
            d: 2.0 * vectors * width * vocabulary / statistics.median(figures[d]["map"]) for d in DTYPES
        },
    }
    report(settings, ratios, args.device)


if __name__ == "__main__":
    main()
