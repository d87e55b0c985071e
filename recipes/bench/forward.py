"""Inference with an attached adapter, and with a merged one, against the bare model: complete prompts, and single
tokens.

python recipes/bench/forward.py [--model MODEL] [--device cuda] [--dtype bfloat16]
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import (
    add_model,
    described,
    interleave,
    load,
    medians,
    parse,
    ratio,
    report,
    sharing_weights,
    synchroniser,
    timed,
)

LAYERS, REPEATS = 4, 21
# Tokens per measurement.
TOKENS = 8


def attached(model: Any, rank: int) -> Any:
    """Attach a frozen adapter with gates at 0.5 to every FFN of `model`."""
    import torch

    from braces_cli.core.adapter.model import attach

    adapter = attach(model, rank)
    for name, parameter in adapter.named_parameters():
        if name.endswith("gate"):
            torch.nn.init.constant_(parameter, 0.5)
        parameter.requires_grad_(False)
    adapter.tensors()  # computes the factors, as loading does
    adapter.unfreeze_base()
    return adapter


def merged(model: Any, rank: int) -> Any:
    """Return the model that plain transformers loads after merging such an adapter."""
    import torch
    from transformers import AutoModelForCausalLM

    from braces_cli.core.models.ffn import find_ffns
    from braces_cli.export.checkpoint import new_neurons, side_paths, write_checkpoint
    from braces_cli.export.plan import ffn_form, plan

    ids = torch.zeros(1, 8, dtype=torch.long, device=model.device)
    ffns, form = ffn_form(model, find_ffns(model), ids)
    planned = plan(model, ffns, form, rank, 64)
    adapter = attached(model, rank)
    neurons = new_neurons(planned, side_paths(adapter), {})
    adapter.detach()
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), model, planned, neurons)
        found = AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype)
    return found.to(model.device).eval()


def prefill(model: Any, prompt: Any) -> Callable[[], None]:
    """Return a forward pass over a complete prompt."""

    def work() -> None:
        model(input_ids=prompt, use_cache=False)

    return work


def decode(model: Any, prompt: Any) -> Callable[[], None]:
    """Return forward passes over single tokens, after a prompt in the cache."""
    cache = model(input_ids=prompt, use_cache=True).past_key_values

    def work() -> None:
        for index in range(TOKENS):
            model(input_ids=prompt[:, index : index + 1], past_key_values=cache, use_cache=True)
        # Every measurement attends to the same number of tokens.
        cache.crop(-TOKENS)

    return work


def measure(args: argparse.Namespace) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Return the seconds of a prompt and of some tokens: bare, attached and merged."""
    import torch

    base, wait, rank = load(args), synchroniser(args.device), args.shape.rank
    model = sharing_weights(base)
    attached(model, rank)
    models = {"attached": model, "merged": merged(sharing_weights(base), rank), "bare": base}
    prompt = torch.randint(0, 256, (1, args.shape.tokens), generator=torch.Generator().manual_seed(0)).to(args.device)
    with torch.no_grad():
        whole = interleave({name: timed(prefill(each, prompt), wait) for name, each in models.items()}, args.repeats)
        single = interleave({name: timed(decode(each, prompt), wait) for name, each in models.items()}, args.repeats)
    return whole, single


def main() -> None:
    args = parse(__doc__, LAYERS, REPEATS, add_model)
    whole, single = measure(args)
    settings = {
        "model": described(args), "rows": 1, "decoded_tokens": TOKENS, "dtype": args.dtype, "device": args.device,
        "repeats": [len(whole["bare"]), len(single["bare"])], "quick": args.quick, "seconds": medians(whole),
        "seconds_decode": medians(single),
    }  # fmt: skip
    ratios = {
        f"{name}_vs_bare{suffix}": ratio(seconds[name], seconds["bare"], target)
        for name, target in (("attached", 1.02), ("merged", 1.01))
        for suffix, seconds in (("", whole), ("_decode", single))
    }
    report(settings, ratios, args.device)


if __name__ == "__main__":
    main()
