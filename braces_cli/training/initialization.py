"""Where training starts: the first projections, the scale, and how much the token path weighs against the FFN.

The leading directions of a symmetric operator are found by subspace iteration: only its products with d_r + 8 vectors
are ever needed, never a matrix (d, d) of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from braces_cli.core.method.adapter import Adapter
from braces_cli.core.method.relevance import RelevanceModule
from braces_cli.core.method.value_gram import gram
from braces_cli.core.models.ffn import FFN
from braces_cli.core.models.loading import input_device
from braces_cli.core.models.moe import MixtureFFN
from braces_cli.core.models.tokenization import Encoded

# Vectors iterated beyond the rank, which makes the last of those wanted converge, too.
_SPARE = 8
_VALUE_ROUNDS = 8
# Each round of `inputs` is a pass of the base over this many rows.
_INPUT_ROUNDS = 3
_INPUT_ROWS = 32


def start_projections(adapter: Adapter, init: str, examples: Sequence[Encoded], seed: int) -> None:
    """Set the first projections of a fresh adapter.

    Args:
        init: `random` leaves them as they were drawn; `values` takes the directions in which the value vectors are
            longest (leading eigenvectors of W_V W_V^T); `inputs` those in which the FFN's inputs are, over the first
            rows of `examples`.
    """
    if init == "random":
        return
    generator = torch.Generator().manual_seed(seed)
    starts = []
    for ffn, brace in adapter.sites:
        columns = min(brace.rank + _SPARE, ffn.hidden_size)
        noise = torch.randn(ffn.hidden_size, columns, generator=generator)
        starts.append(torch.linalg.qr(noise.to(brace.weight.device)).Q)

    def by_values(vectors: list[Tensor]) -> list[Tensor]:
        return [_value_product(ffn, x) for (ffn, _), x in zip(adapter.sites, vectors, strict=True)]

    def by_inputs(vectors: list[Tensor]) -> list[Tensor]:
        return _input_products(adapter, examples[:_INPUT_ROWS], vectors)

    products, rounds = (by_values, _VALUE_ROUNDS) if init == "values" else (by_inputs, _INPUT_ROUNDS)
    with torch.no_grad():
        for (_, brace), found in zip(adapter.sites, leading(products, starts, rounds), strict=True):
            brace.set_weight(found[:, : brace.rank].mT)


def leading(products: Callable[[list[Tensor]], list[Tensor]], starts: list[Tensor], rounds: int) -> list[Tensor]:
    """Leading eigenvectors of several symmetric operators at once, as columns, largest eigenvalue first.

    Args:
        products: each operator's product with its own vectors (d, n).
        starts: orthonormal columns (d, n) to start from.
    """
    vectors = starts
    for _ in range(rounds):
        vectors = [torch.linalg.qr(moved).Q for moved in products(vectors)]
    turned = []
    for x, moved in zip(vectors, products(vectors), strict=True):
        small = x.mT @ moved
        turned.append(x @ torch.linalg.eigh((small + small.mT) / 2).eigenvectors.flip(-1))
    return turned


def _value_product(ffn: FFN | MixtureFFN, x: Tensor) -> Tensor:
    """W_V W_V^T x, summed over experts."""
    total = torch.zeros_like(x)
    for part in ffn.parts:
        each = gram(part.values(), x.to(part.values().device)).to(x)
        total += each if each.ndim == 2 else each.sum(dim=0)
    return total


def _input_products(adapter: Adapter, examples: Sequence[Encoded], vectors: list[Tensor]) -> list[Tensor]:
    """sum_i h_i (h_i^T x) over all tokens of `examples`, of each layer with its own x."""
    totals = [torch.zeros_like(x) for x in vectors]

    def keep(index: int) -> Callable[[Tensor], None]:
        def add(h: Tensor) -> None:
            h = h.detach().reshape(-1, h.shape[-1]).to(vectors[index])
            totals[index] += h.mT @ (h @ vectors[index])

        return add

    with ExitStack() as stack:
        stack.enter_context(adapter.disabled())
        for index, (ffn, _) in enumerate(adapter.sites):
            # Of experts that are modules of their own each sees its tokens; the layer sees all, once.
            stack.callback(ffn.watch(keep(index)).remove)
        _pass(adapter.model, examples)
    return totals


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
