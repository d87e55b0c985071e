"""Inference with an adapter attached and frozen against the bare model: whole prompts, and token by token.

python recipes/bench/forward.py [--device cuda] [--dtype bfloat16]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from _bench import build_model, interleave, medians, parse, ratio, report, synchroniser, timed, twin

LAYERS, REPEATS = 4, 21
RANK = 16
PROMPT = 256
# Tokens decoded in one measurement.
TOKENS = 8


def attached(model: Any) -> Any:
    """`model` with a relevance module on every FFN, as it is after loading an adapter: frozen, gates half open."""
    import torch

    from braces_cli.core.adapter import attach

    adapter = attach(model, RANK)
    for _, brace in adapter.sites:
        torch.nn.init.zeros_(brace.gate)
        brace.requires_grad_(False)
    adapter.tensors()
    return model


def prefill(model: Any, prompt: Any) -> Callable[[], None]:
    """A forward pass over a whole prompt."""

    def work() -> None:
        model(input_ids=prompt, use_cache=False)

    return work


def decode(model: Any, prompt: Any) -> Callable[[], None]:
    """Forward passes over one token at a time, after a prompt that is in the cache."""
    cache = model(input_ids=prompt, use_cache=True).past_key_values

    def work() -> None:
        for index in range(TOKENS):
            model(input_ids=prompt[:, index : index + 1], past_key_values=cache, use_cache=True)
        # Back to the prompt, so that every measurement attends to as many tokens.
        cache.crop(-TOKENS)

    return work


def measure(args: argparse.Namespace) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds of a prompt and of some tokens, for the bare model and for the one with the adapter."""
    import torch

    base, wait = build_model(args).eval(), synchroniser(args.device)
    models = {"attached": attached(twin(base)), "bare": base}
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, 256, (1, 16 if args.quick else PROMPT), generator=generator).to(args.device)
    with torch.no_grad():
        whole = interleave({name: timed(prefill(model, prompt), wait) for name, model in models.items()}, args.repeats)
        by_token = interleave(
            {name: timed(decode(model, prompt), wait) for name, model in models.items()}, args.repeats
        )
    return whole, by_token


def main() -> None:
    args = parse(__doc__, LAYERS, REPEATS)
    whole, by_token = measure(args)
    settings = {
        "layers": args.layers,
        "rows": 1,
        "prompt_tokens": 16 if args.quick else PROMPT,
        "decoded_tokens": TOKENS,
        "dtype": args.dtype,
        "device": args.device,
        "repeats": [len(whole["bare"]), len(by_token["bare"])],
        "quick": args.quick,
        "attached": f"rank {RANK} on every FFN, gates 0.5, frozen",
        "attached_vs_bare": "one pass over the prompt, without cache",
        "attached_vs_bare_decode": "one token a pass, the prompt in the cache",
        "seconds": medians(whole),
        "seconds_decode": medians(by_token),
    }
    ratios = {
        "attached_vs_bare": ratio(whole["attached"], whole["bare"], 1.02),
        "attached_vs_bare_decode": ratio(by_token["attached"], by_token["bare"], 1.02),
    }
    report(settings, ratios, args.device)


if __name__ == "__main__":
    main()
