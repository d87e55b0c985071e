"""Where training starts: how large the token path is beside the FFN's output, and `--scale auto`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from braces_cli.core.method.adapter import Adapter
from braces_cli.core.method.relevance import RelevanceModule
from braces_cli.core.models.loading import input_device
from braces_cli.core.models.tokenization import Encoded


def _pass(model: Any, examples: Sequence[Encoded]) -> None:
    """Run the model over examples, each alone, so that nothing that is measured on the way is padding."""
    device, was_training = input_device(model), model.training
    model.eval()
    try:
        with torch.no_grad():
            for example in examples:
                model(input_ids=torch.tensor([example.ids], device=device), use_cache=False)
    finally:
        model.train(was_training)


def token_path_shares(adapter: Adapter, examples: Sequence[Encoded]) -> list[float]:
    """For each layer |B A h| / |FFN(h)|, the median over the tokens of `examples`, with the gate as it stands."""
    seen: list[list[Tensor]] = [[] for _ in adapter.sites]
    with ExitStack() as stack:
        for (_, brace), ratios in zip(adapter.sites, seen, strict=True):
            stack.enter_context(_watched(brace, ratios))
        _pass(adapter.model, examples)
    return [float(torch.cat(ratios).median()) if ratios else 0.0 for ratios in seen]


@contextmanager
def _watched(brace: RelevanceModule, ratios: list[Tensor]) -> Iterator[None]:
    """Keep |term| / |output| of every row that passes through `brace`, where the output is not zero."""

    def watch(add: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(output: Tensor, *rest: Any) -> Tensor:
            # Added to zero: the difference of two bfloat16 sums would be rounding.
            term = add(torch.zeros_like(output), *rest).detach().float().flatten(0, -2).norm(dim=-1)
            size = output.detach().float().flatten(0, -2).norm(dim=-1)
            ratios.append((term / size)[size > 0].cpu())
            return add(output, *rest)

        return call

    names = ("forward", "routed", "by_expert")
    for name in names:
        setattr(brace, name, watch(getattr(brace, name)))
    try:
        yield
    finally:
        for name in names:
            delattr(brace, name)


def scale_to_base(adapter: Adapter, examples: Sequence[Encoded]) -> None:
    """Set each layer's scale so that with a fully open gate the token path would be as large as the FFN's output.

    With it the start depends neither on the size of W_V against that of the activations nor on the width.
    """
    for (_, brace), share in zip(adapter.sites, token_path_shares(adapter, examples), strict=True):
        if share > 0:
            brace.set_scale(brace.scale * float(brace.g.detach()) / share)
