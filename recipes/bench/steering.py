"""Tokens a second while steering: against the same adapter unsteered, and against one vector a layer by a plain hook.

python recipes/bench/steering.py [--device cuda] [--dtype bfloat16]

steered_vs_unsteered          adapter with one attribute over the same adapter with none
steered_vs_unsteered_five     the same with five attributes at once
steered_vs_control_vector     adapter with one attribute over the bare model with a vector added behind every layer
untrained_vs_control_vector   steering without training over the same: both only add vectors to a bare model
mixed_vs_uniform              seconds of a batch in which each row has attributes of its own (four in all, at nine
                              strengths) over those of a batch that is steered alike, setting them up included
mixed_vs_uniform_untrained    the same without an adapter
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from _bench import build_model, interleave, medians, parse, ratio, report, synchroniser, timed, twin

from braces_cli.training.settings import DEFAULT_RANK

LAYERS, REPEATS = 4, 21
PROMPT = 32
# Generated in one measurement.
TOKENS = 16
ATTRIBUTES = 5
# Rows of a batch that is steered row by row.
ROWS = 64


def attributes(model: Any) -> list[Any]:
    """Attributes with random states: what steering costs does not depend on them."""
    import torch

    from braces_cli.core.attributes.vector import Attribute
    from braces_cli.core.models.ffn import find_ffns

    ffns = find_ffns(model)
    generator = torch.Generator().manual_seed(1)
    shape = (len(ffns), ffns[0].hidden_size)

    def one(name: str) -> Any:
        ones = torch.ones(len(ffns))
        state = torch.randn(shape, generator=generator)
        layers = [ffn.layer for ffn in ffns]
        return Attribute(name, [], state, torch.zeros(shape), ones, 1e-3 * ones, layers, {})

    return [one(f"attribute {k}") for k in range(ATTRIBUTES)]


def steered_models(base: Any, stack: ExitStack) -> dict[str, Any]:
    """Twins of `base`, each steered in another way until `stack` is closed."""
    from braces_cli.core.adapter.model import Session
    from braces_cli.core.attributes.hooks import steered
    from braces_cli.core.models.ffn import find_ffns
    from braces_cli.core.models.load import Base

    known = attributes(base)
    models: dict[str, Any] = {}
    for name, count, trained in (("unsteered", 0, True), ("one", 1, True), ("five", 5, True), ("untrained", 1, False)):
        model = twin(base)
        session = Session(Base(model, None, name, None, None), find_ffns(model))
        if trained:
            session.adapter = adapter_on(model)
        stack.enter_context(steered(session, [(attribute, 1.0) for attribute in known[:count]]))
        models[name] = model
    models["control vector"] = with_hooks(twin(base))
    return models


def batch_works(base: Any, prompt: Any, tokens: int) -> dict[str, Callable[[], None]]:
    """Generation of a batch, steered alike or row by row, with an adapter and without one."""
    from braces_cli.core.adapter.model import Session
    from braces_cli.core.attributes.hooks import steered, terms_of_rows
    from braces_cli.core.models.ffn import find_ffns
    from braces_cli.core.models.load import Base

    known = {attribute.name: attribute for attribute in attributes(base)[:4]}
    names, count = list(known), prompt.shape[0]
    mixed = [{names[row % 4]: row % 9 - 4.0} for row in range(count)]
    works = {}
    for kind in ("trained", "untrained"):
        model = twin(base)
        session = Session(Base(model, None, kind, None, None), find_ffns(model))
        if kind == "trained":
            session.adapter = adapter_on(model)
        run = generation(model, prompt, tokens)
        for name, rows in (("uniform", [{names[0]: 2.0}] * count), ("mixed", mixed)):

            def work(session: Any = session, rows: Any = rows, run: Any = run) -> None:
                with steered(session, terms_of_rows(known.__getitem__, rows)):
                    run()

            works[f"{name} {kind}"] = work
    return works


def adapter_on(model: Any) -> Any:
    """An adapter as it is after loading: frozen, gates half open, its factors computed."""
    import torch

    from braces_cli.core.adapter.model import attach

    adapter = attach(model, DEFAULT_RANK)
    for _, adapter_layer in adapter.adapted_ffns:
        torch.nn.init.constant_(adapter_layer.gate, 0.5)
        adapter_layer.requires_grad_(False)
    adapter.tensors()
    return adapter


def with_hooks(model: Any) -> Any:
    """`model` with a plain hook on every layer that adds a vector to what leaves it, as control vectors are added."""
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
    """Greedy generation of `tokens` tokens by transformers' own loop, with a cache, as `braces steer` runs it."""
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
    args: argparse.Namespace = parse(__doc__, LAYERS, REPEATS)
    import torch

    base, wait = build_model(args).eval(), synchroniser(args.device)
    tokens, length = (4, 8) if args.quick else (TOKENS, PROMPT)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, 256, (1, length), generator=generator).to(args.device)
    with ExitStack() as stack:
        models = steered_models(base, stack)
        works = {name: timed(generation(model, prompt, tokens), wait) for name, model in models.items()}
        rows = 4 if args.quick else ROWS
        batch = torch.randint(0, 256, (rows, length), generator=generator).to(args.device)
        works |= {name: timed(work, wait) for name, work in batch_works(base, batch, tokens).items()}
        seconds = interleave(works, args.repeats)
    settings = {
        "layers": args.layers,
        "rows": 1,
        "rows_of_batches": rows,
        "prompt_tokens": length,
        "generated_tokens": tokens,
        "dtype": args.dtype,
        "device": args.device,
        "repeats": len(seconds["one"]),
        "quick": args.quick,
        "adapter": f"rank {DEFAULT_RANK} on every FFN, gates half open, frozen",
        "tokens_per_second": {
            name: tokens * (rows if " " in name and name != "control vector" else 1) / value
            for name, value in medians(seconds).items()
        },
    }
    # Of two rates at as many tokens: the seconds the other way round.
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
