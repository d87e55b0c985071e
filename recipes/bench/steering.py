"""Tokens per second of steered generation: against the same adapter unsteered, and against a plain hook on each layer.

python recipes/bench/steering.py [--model MODEL] [--device cuda] [--dtype bfloat16]

steered_vs_unsteered          adapter with one attribute / the same adapter without
steered_vs_unsteered_five     the same with five attributes
steered_vs_control_vector     adapter with one attribute / bare model with a vector added after every layer
untrained_vs_control_vector   one attribute without an adapter / the same: both add vectors to a bare model
mixed_vs_uniform              seconds of a batch with different attributes per row (four attributes, nine strengths) /
                              those of a batch with the same attribute in every row, setup included
mixed_vs_uniform_untrained    the same without an adapter
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import ExitStack
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
from forward import attached

LAYERS, REPEATS = 4, 21
PROMPT = 32
# New tokens per measurement.
TOKENS = 16
ATTRIBUTES = 5
# Rows of a batch with different attributes.
ROWS = 64


def attributes(model: Any) -> list[Any]:
    """Return attributes with random states; the cost of steering does not depend on the states."""
    import torch

    from braces_cli.core.attributes.vector import Attribute
    from braces_cli.core.models.ffn import find_ffns

    ffns = find_ffns(model)
    generator = torch.Generator().manual_seed(1)
    shape = (2, len(ffns), ffns[0].hidden_size)

    def one(name: str) -> Any:
        ones = torch.ones(len(ffns))
        state = torch.randn(shape, generator=generator)
        layers = [ffn.layer for ffn in ffns]
        return Attribute(name, [], state, torch.zeros(shape), ones, 1e-3 * ones, layers, {}, ones)

    return [one(f"attribute {k}") for k in range(ATTRIBUTES)]


def session_of(base: Any, name: str, rank: int | None) -> Any:
    """Open a session on a copy of `base`, with an adapter if `rank` is not None."""
    from braces_cli.core.adapter.model import Session
    from braces_cli.core.models.load import Base

    model = sharing_weights(base)
    session = Session(Base(model, None, name))
    if rank is not None:
        session.adapter = attached(model, rank)
    return session


def steered_models(base: Any, rank: int, stack: ExitStack) -> dict[str, Any]:
    """Return copies of `base`, each steered in another way until `stack` is closed."""
    from braces_cli.core.attributes.hooks import steered

    known = attributes(base)
    models: dict[str, Any] = {}
    for name, count, trained in (("unsteered", 0, True), ("one", 1, True), ("five", 5, True), ("untrained", 1, False)):
        session = session_of(base, name, rank if trained else None)
        stack.enter_context(steered(session, [(attribute, 1.0) for attribute in known[:count]]))
        models[name] = session.base.model
    models["control vector"] = with_hooks(sharing_weights(base))
    return models


def batch_works(base: Any, rank: int, prompt: Any, tokens: int) -> dict[str, Callable[[], None]]:
    """Return the generation of a batch with the same or different attributes per row, with and without adapter."""
    from braces_cli.core.attributes.hooks import steered, terms_of_rows

    known = {attribute.name: attribute for attribute in attributes(base)[:4]}
    names, count = list(known), prompt.shape[0]
    mixed = [{names[row % 4]: row % 9 - 4.0} for row in range(count)]
    works = {}
    for kind in ("trained", "untrained"):
        session = session_of(base, kind, rank if kind == "trained" else None)
        run = generation(session.base.model, prompt, tokens)
        for name, rows in (("uniform", [{names[0]: 2.0}] * count), ("mixed", mixed)):

            def work(session: Any = session, rows: Any = rows, run: Any = run) -> None:
                with steered(session, terms_of_rows(known.__getitem__, rows)):
                    run()

            works[f"{name} {kind}"] = work
    return works


def with_hooks(model: Any) -> Any:
    """Add a vector to the output of every layer of `model` by a plain hook, as control vectors are added."""
    import torch

    def adder(vector: Any) -> Callable[..., Any]:
        def hook(module: Any, args: Any, output: Any) -> Any:
            return (output[0] + vector, *output[1:]) if isinstance(output, tuple) else output + vector

        return hook

    generator = torch.Generator().manual_seed(2)
    for layer in model.model.layers:
        weight = layer.mlp.down_proj.weight
        vector = 1e-3 * torch.randn(weight.shape[0], generator=generator)
        layer.register_forward_hook(adder(vector.to(weight)))
    return model


def generation(model: Any, prompt: Any, tokens: int) -> Callable[[], None]:
    """Return greedy generation by the loop of transformers, with a cache, as `braces steer` runs it."""
    import torch
    from transformers import GenerationConfig

    config = GenerationConfig(
        max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, num_beams=1, use_cache=True, pad_token_id=0
    )
    mask = torch.ones_like(prompt)

    def work() -> None:
        with torch.no_grad():
            model.generate(input_ids=prompt, attention_mask=mask, generation_config=config)

    return work


def main() -> None:
    args: argparse.Namespace = parse(__doc__, LAYERS, REPEATS, add_model)
    import torch

    base, wait, rank = load(args), synchroniser(args.device), args.shape.rank
    tokens, length = (4, 8) if args.quick else (TOKENS, PROMPT)
    rows = 4 if args.quick else ROWS
    generator = torch.Generator().manual_seed(0)
    prompt, batch = (torch.randint(0, 256, (n, length), generator=generator).to(args.device) for n in (1, rows))
    with ExitStack() as stack:
        models = steered_models(base, rank, stack)
        works = {name: timed(generation(model, prompt, tokens), wait) for name, model in models.items()}
        works |= {name: timed(work, wait) for name, work in batch_works(base, rank, batch, tokens).items()}
        seconds = interleave(works, args.repeats)
    settings = {
        "model": described(args), "rows_of_batches": rows, "prompt_tokens": length, "generated_tokens": tokens,
        "dtype": args.dtype, "device": args.device, "repeats": len(seconds["one"]), "quick": args.quick,
        "seconds": medians(seconds),
    }  # fmt: skip
    # Ratios of rates are inverse ratios of seconds.
    ratios = {
        "steered_vs_unsteered": ratio(seconds["unsteered"], seconds["one"], 0.98),
        "steered_vs_unsteered_five": ratio(seconds["unsteered"], seconds["five"], 0.98),
        "steered_vs_control_vector": ratio(seconds["control vector"], seconds["one"], 1.0),
        "untrained_vs_control_vector": ratio(seconds["control vector"], seconds["untrained"], 1.0),
        "mixed_vs_uniform": ratio(seconds["mixed trained"], seconds["uniform trained"], 1.02),
        "mixed_vs_uniform_untrained": ratio(seconds["mixed untrained"], seconds["uniform untrained"], 1.02),
    }
    report(settings, ratios, args.device)


if __name__ == "__main__":
    main()
