"""Inference with an adapter attached and frozen, and merged, against the bare model: whole prompts, and token by token.

python recipes/bench/forward.py [--device cuda] [--dtype bfloat16]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from _bench import build_model, interleave, medians, parse, ratio, report, synchroniser, timed, twin

from braces_cli.training.settings import DEFAULT_RANK

LAYERS, REPEATS = 4, 21
PROMPT = 256
# Tokens decoded in one measurement.
TOKENS = 8


def half_open(model: Any) -> Any:
    """An adapter on every FFN of `model`: frozen, gates half open."""
    import torch

    from braces_cli.core.adapter.model import attach

    adapter = attach(model, DEFAULT_RANK)
    for _, adapter_layer in adapter.adapted_ffns:
        torch.nn.init.constant_(adapter_layer.gate, 0.5)
        adapter_layer.requires_grad_(False)
    return adapter


def attached(model: Any) -> Any:
    """`model` with a relevance module on every FFN, as it is after loading an adapter."""
    half_open(model).tensors()
    return model


def merged(model: Any) -> Any:
    """The checkpoint that merging such an adapter gives, as plain transformers loads it."""
    import tempfile
    from pathlib import Path

    import torch
    from transformers import AutoModelForCausalLM

    from braces_cli.core.models.ffn import find_ffns
    from braces_cli.export.checkpoint import new_neurons, write_checkpoint
    from braces_cli.export.form import observed_form
    from braces_cli.export.planner import plain_ffns, plan

    ffns = plain_ffns(model, find_ffns(model))
    ids = torch.zeros(1, 8, dtype=torch.long, device=model.device)
    made = plan(model, ffns, observed_form(model, ffns, ids), DEFAULT_RANK, 64, False)
    adapter = half_open(model)
    neurons = new_neurons(adapter, made)
    adapter.detach()
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), model, made, neurons, [ffn.layer for ffn in ffns])
        found = AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype)
    return found.to(model.device).eval().requires_grad_(False)


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
    """Seconds of a prompt and of some tokens, for the bare model and for those with the adapter."""
    import torch

    base, wait = build_model(args).eval(), synchroniser(args.device)
    models = {"attached": attached(twin(base)), "merged": merged(twin(base)), "bare": base}
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
        "attached": f"rank {DEFAULT_RANK} on every FFN, gates half open, frozen",
        "merged": f"rank {DEFAULT_RANK} merged into every FFN, width a multiple of 64, loaded by plain transformers",
        "attached_vs_bare": "one pass over the prompt, without cache",
        "attached_vs_bare_decode": "one token a pass, the prompt in the cache",
        "seconds": medians(whole),
        "seconds_decode": medians(by_token),
    }
    ratios = {
        "attached_vs_bare": ratio(whole["attached"], whole["bare"], 1.02),
        "attached_vs_bare_decode": ratio(by_token["attached"], by_token["bare"], 1.02),
        "merged_vs_bare": ratio(whole["merged"], whole["bare"], 1.01),
        "merged_vs_bare_decode": ratio(by_token["merged"], by_token["bare"], 1.01),
    }
    report(settings, ratios, args.device)


if __name__ == "__main__":
    main()
