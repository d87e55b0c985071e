"""A vocabulary map of value vectors against a plain matrix product, and against one vector at a time.

python recipes/bench/inspection.py [--device cuda] [--threads 2]

map_vs_gemm   flops per second of a map / those of a plain product of the same dtype
map_vs_loop   the same / those of LM head, norm and topk for single vectors
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

from common import can_measure_memory, interleave, medians, parse, peak, qwen2, ratio, report, reset_peak, synchroniser

REPEATS = 7
VECTORS, WIDTH, VOCABULARY, TOP_K = 2048, 1536, 151_936, 10
QUICK = (64, 64, 1000, 10)
# Tokens of the plain product: a part of the map's, to save time.
GEMM_TOKENS = 4096
LOOP = 4
DTYPES = ("float32", "bfloat16")


def head(args: argparse.Namespace, dtype: str) -> Any:
    """Build a model of one layer with the shapes of norm, head and value vectors."""
    vectors, width, vocabulary, _ = QUICK if args.quick else (VECTORS, WIDTH, VOCABULARY, TOP_K)
    return qwen2(
        dtype, args.device, vocab_size=vocabulary, hidden_size=width, intermediate_size=vectors, num_hidden_layers=1,
        num_attention_heads=width // 64, num_key_value_heads=1,
    ).eval().requires_grad_(False)  # fmt: skip


def rates(args: argparse.Namespace, model: Any, part: int) -> tuple[dict[str, Callable[[], float]], float | None]:
    """Return measurements of flops per second, and the peak bytes of a map of all vectors above the model."""
    import torch

    from braces_cli.core.models.ffn import find_ffns
    from braces_cli.core.models.load import Base
    from braces_cli.inspection.vocabulary import LogitLens

    wait = synchroniser(args.device)
    matrix = find_ffns(model)[0].value_matrix().mT
    lens, weight = LogitLens(Base(model, None, "")), model.get_output_embeddings().weight
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
    # bfloat16 can be eight times slower than float32 on a CPU, so fewer rows are multiplied.
    gemm_rows = rows // 4 if args.device == "cpu" and weight.dtype == torch.bfloat16 else rows
    block = weight[:gemm_rows].clone()
    some = matrix[:part]

    def loop() -> None:
        for vector in matrix[:LOOP]:
            model.lm_head(lens.hidden(vector[None]).to(weight.dtype)).topk(k)

    taken = None
    if can_measure_memory(args.device):
        before = reset_peak(args.device)
        with torch.no_grad():
            lens.best(matrix, k)
        taken = float(peak(args.device) - before)
    return {
        "map": rate(lambda: lens.best(some, k), len(some), vocabulary),
        "gemm": rate(lambda: hidden @ block.mT, len(hidden), len(block)),
        "loop": rate(loop, LOOP, vocabulary),
    }, taken


def main() -> None:
    args = parse(__doc__, 1, REPEATS)
    import torch

    part = VECTORS if args.device != "cpu" else VECTORS // 8
    figures: dict[str, dict[str, list[float]]] = {}
    memory = {}
    with torch.no_grad():
        # One dtype after the other, to save memory. Each ratio is within one dtype.
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
