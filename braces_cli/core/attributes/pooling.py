"""What an attribute's words or texts have in common inside a base: the inputs of its FFNs, pooled to one a layer.

How far an attribute pushes without training, and in which layers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from braces_cli.core.adapter.model import Session
from braces_cli.core.attributes.words import POOLINGS, neutral_texts
from braces_cli.core.errors import ConfigError
from braces_cli.core.models.ffn import FFN, MixtureFFN, layer_stack
from braces_cli.core.models.load import input_device
from braces_cli.core.models.residual import residual_gains
from braces_cli.core.models.structure import layer_output
from braces_cli.core.models.tokenize import context_length, encode, encode_word
from braces_cli.core.progress import Report, silent

# One for each of POOLINGS: over the tokens of each word or text, (rows, tokens, d) -> (rows, d).
_OVER_TOKENS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda h: h.mean(dim=1),
    "last": lambda h: h[:, -1],
    "max": lambda h: h.amax(dim=1),
}
_ROWS = 64
# Tokens, and how many of the first are not pooled over.
Row = tuple[list[int], int]
# Calls a function with each tensor (..., d) that passes a place, until what it returns is removed.
Watch = Callable[[Callable[[Tensor], None]], Any]


def pool_words(
    model: nn.Module,
    tokenizer: Any,
    ffns: Sequence[FFN | MixtureFFN],
    words: Sequence[str],
    report: Report = silent,
    pooling: str = "mean",
) -> Tensor:
    """FFN inputs pooled over each word's tokens, then their mean over words: (layers, d) in float32 on the CPU.

    Each word stands alone, with a space in front and without special tokens.
    """
    return _pool(model, ffns, [(encode_word(tokenizer, word), 0) for word in words], pooling, report, "pooling words")


def pool_texts(
    model: nn.Module,
    tokenizer: Any,
    ffns: Sequence[FFN | MixtureFFN],
    texts: Sequence[str],
    report: Report = silent,
    pooling: str = "mean",
) -> Tensor:
    """The same of texts: encoded as any text is, but special tokens in front are not pooled over.

    Texts longer than the model's context are cut.
    """
    max_length, special = context_length(model.config, tokenizer), set(tokenizer.all_special_ids)
    rows = []
    for text in texts:
        ids = encode(tokenizer, text, max_length=max_length).ids
        rows.append((ids, next((place for place, token in enumerate(ids) if token not in special), 0)))
    return _pool(model, ffns, rows, pooling, report, "pooling texts")


def _pool(
    model: nn.Module,
    ffns: Sequence[FFN | MixtureFFN],
    rows: Sequence[Row],
    pooling: str,
    report: Report,
    stage: str,
) -> Tensor:
    """Mean over rows of what enters the FFNs, (layers, d); rows without tokens are left out."""
    rows = [row for row in rows if row[0]]
    total = torch.zeros(len(ffns), ffns[0].hidden_size)
    for _, pooled in pooled_batches(model, input_watches(ffns), rows, pooling, report, stage):
        total += pooled.sum(dim=1)
    return total / max(len(rows), 1)


def input_watches(ffns: Sequence[FFN | MixtureFFN]) -> list[Watch]:
    """Watch what enters each FFN."""
    return [ffn.watch for ffn in ffns]


def output_watches(model: nn.Module, ffns: Sequence[FFN | MixtureFFN]) -> list[Watch]:
    """Watch what the decoder layer of each FFN gives to the next: the residual stream behind it."""
    stack = layer_stack(model)[1]

    def watch(layer: nn.Module, callback: Callable[[Tensor], None]) -> Any:
        return layer.register_forward_hook(lambda module, args, output: callback(layer_output(output)))

    return [partial(watch, stack[ffn.layer]) for ffn in ffns]


def pooled_batches(
    model: nn.Module, watches: Sequence[Watch], rows: Sequence[Row], pooling: str, report: Report, stage: str
) -> Iterator[tuple[list[int], Tensor]]:
    """(indices of rows, their pooled states (layers, rows, d) in float32 on the CPU) of each batch.

    Rows of one length and one first token share a batch, so there is no padding.

    Raises:
        ConfigError: no such pooling.
    """
    if pooling not in _OVER_TOKENS:
        raise ConfigError(f"no pooling `{pooling}`", where="--pooling", hint=f"One of {', '.join(POOLINGS)}.")
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index, (ids, skipped) in enumerate(rows):
        groups[len(ids), skipped].append(index)
    device = input_device(model)
    seen = _Seen(_OVER_TOKENS[pooling])
    done = 0
    with ExitStack() as stack:
        for index, watch in enumerate(watches):
            stack.callback(watch(seen.watcher(index)).remove)
        for (_, seen.skipped), group in groups.items():
            for start in range(0, len(group), _ROWS):
                indices = group[start : start + _ROWS]
                seen.rows = len(indices)
                with torch.no_grad():
                    model(input_ids=torch.tensor([rows[index][0] for index in indices], device=device), use_cache=False)
                done += len(indices)
                report(stage, done, len(rows))
                yield indices, torch.stack([seen.pooled[index] for index in range(len(watches))])


class _Seen:
    """What the watched places saw in the last pass, pooled over tokens, (rows, d) each."""

    def __init__(self, over_tokens: Callable[[Tensor], Tensor]) -> None:
        self.rows = 0
        self.skipped = 0
        self.pooled: dict[int, Tensor] = {}
        self._over_tokens = over_tokens

    def watcher(self, index: int) -> Callable[[Tensor], None]:
        def watch(h: Tensor) -> None:
            # (rows, tokens, d), also where a model flattens its tokens before the FFN.
            h = h.detach().float().reshape(self.rows, -1, h.shape[-1])[:, self.skipped :]
            self.pooled[index] = self._over_tokens(h).cpu()

        return watch


def residual_norms(model: nn.Module, tokenizer: Any, ffns: Sequence[FFN | MixtureFFN]) -> Tensor:
    """Median norm of the residual stream behind the layer of each FFN, over shipped neutral text: (layers,)."""
    stack = layer_stack(model)[1]
    device = input_device(model)
    norms: dict[int, list[Tensor]] = {ffn.layer: [] for ffn in ffns}

    def keep(layer: int) -> Any:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            norms[layer].append(layer_output(output).detach().float().norm(dim=-1).flatten().cpu())

        return hook

    with ExitStack() as handles:
        for layer in norms:
            handles.callback(stack[layer].register_forward_hook(keep(layer)).remove)
        for line in neutral_texts():
            with torch.no_grad():
                model(input_ids=torch.tensor([encode(tokenizer, line).ids], device=device), use_cache=False)
    return torch.stack([torch.cat(norms[ffn.layer]).median() for ffn in ffns])


# Without training, s = 1 pushes by this share of the median residual norm in all, spread evenly over the layers pushed:
# pushes along one direction add up in the residual stream, so what counts is their sum, whatever the depth.
STEERING_SHARE = 0.1


def default_layers(layers: Sequence[int]) -> list[int]:
    """The layers that are pushed without training where none are named: the first half. What is pushed there, the rest
    of the model makes language of; the same push at the end costs more perplexity for less of the attribute.
    """
    return list(layers[: (len(layers) + 1) // 2])


def output_norms(session: Session) -> Tensor:
    """Norm of what, added to what the FFN writes, moves the residual stream behind its layer by its own median norm:
    (layers,). It is that norm itself where the FFN's output is added as it is. An adapter that is attached stays out.
    """
    base = session.base
    ids = torch.tensor([encode(base.tokenizer, neutral_texts()[0]).ids], device=input_device(base.model))
    with nullcontext() if session.adapter is None else session.adapter.disabled():
        gains = residual_gains(base.model, session.ffns, ids)
        norms = residual_norms(base.model, base.tokenizer, session.ffns)
    # A layer whose FFN cannot be heard at all is not pushed harder for it.
    return norms / torch.where(gains.isfinite() & (gains > 0), gains, torch.ones_like(gains))


def steering_scale(residual: Tensor, direction: Tensor, steered_layers: Sequence[int]) -> Tensor:
    """What makes `scale * direction` the push of s = 1, the same share of the residual norm in each layer: (layers,).

    Where there is no direction, no push rather than a division by zero.

    Args:
        residual: see `output_norms`.
        pushed: the layers over which STEERING_SHARE is spread.
    """
    size = direction.norm(dim=-1)
    return torch.where(size > 0, STEERING_SHARE / max(len(steered_layers), 1) * residual / size, torch.zeros_like(size))
