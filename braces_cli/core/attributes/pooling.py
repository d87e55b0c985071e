"""FFN inputs of words and texts in the bare base, pooled to one state per layer, and norms of the residual stream.

pooled(words) = mean over words of the mean over each word's tokens of h, the input of the FFN
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from braces_cli.core.adapter.model import Session
from braces_cli.core.attributes.words import neutral_texts
from braces_cli.core.models.ffn import FFN, MixtureFFN, layer_stack, watch_output
from braces_cli.core.models.load import input_device
from braces_cli.core.models.residual import residual_gains
from braces_cli.core.models.structure import layer_output, only_scored
from braces_cli.core.models.tokenize import context_length, encode, encode_word
from braces_cli.core.progress import Report, silent

# For each of POOLINGS: over the tokens of each word or text, (rows, tokens, d) -> (rows, d).
_OVER_TOKENS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda h: h.mean(dim=1),
    "last": lambda h: h[:, -1],
    "max": lambda h: h.amax(dim=1),
}
_ROWS = 64
# Tokens, and the number of leading tokens that are not pooled.
Row = tuple[list[int], int]
# Registers a function that is called with each tensor (..., d) of a pass; returns a handle that removes it.
Watch = Callable[[Callable[[Tensor], None]], Any]


def pool_words(session: Session, words: Sequence[str], report: Report = silent, pooling: str = "mean") -> Tensor:
    """Return the FFN inputs and outputs pooled over each word's tokens, then averaged over words: (2, layers, d).

    In float32 on the CPU. Each word is a separate sequence, with a leading space and without special tokens.
    """
    rows = [(encode_word(session.base.tokenizer, word), 0) for word in words]
    return _pool(session, rows, pooling, report, "pooling words")


def pool_texts(session: Session, texts: Sequence[str], report: Report = silent, pooling: str = "mean") -> Tensor:
    """Return the FFN inputs and outputs of texts, pooled as in `pool_words`.

    Leading special tokens are not pooled. Texts longer than the model's context are truncated.
    """
    return _pool(session, text_rows(session, texts), pooling, report, "pooling texts")


def text_rows(session: Session, texts: Sequence[str]) -> list[Row]:
    """Return the tokens of each text, and the place of the first one that is not special."""
    tokenizer = session.base.tokenizer
    max_length, special = context_length(session.base.model.config, tokenizer), set(tokenizer.all_special_ids)
    rows = []
    for text in texts:
        ids = encode(tokenizer, text, max_length=max_length).ids
        rows.append((ids, next((place for place, token in enumerate(ids) if token not in special), 0)))
    return rows


def _pool(session: Session, rows: Sequence[Row], pooling: str, report: Report, stage: str) -> Tensor:
    """Return the mean over rows of the pooled FFN inputs and outputs; rows without tokens are left out."""
    rows = [row for row in rows if row[0]]
    watches = ffn_watches(session.ffns)
    total = torch.zeros(len(watches), session.ffns[0].hidden_size)
    with session.bare():
        for _, pooled in pooled_batches(session.base.model, watches, rows, pooling, report, stage):
            total += pooled.sum(dim=1)
    return (total / max(len(rows), 1)).unflatten(0, (2, -1))


def ffn_watches(ffns: Sequence[FFN | MixtureFFN]) -> list[Watch]:
    """Return a watch of the input of each FFN, then one of the output of each."""
    return [*(ffn.watch for ffn in ffns), *(partial(watch_output, ffn) for ffn in ffns)]


def output_watches(model: nn.Module, ffns: Sequence[FFN | MixtureFFN]) -> list[Watch]:
    """Return a watch of the residual stream after the decoder layer of each FFN."""
    stack = layer_stack(model)[1]

    def watch(layer: nn.Module, callback: Callable[[Tensor], None]) -> Any:
        return layer.register_forward_hook(lambda module, args, output: callback(layer_output(output)))

    return [partial(watch, stack[ffn.layer]) for ffn in ffns]


def pooled_batches(
    model: Any, watches: Sequence[Watch], rows: Sequence[Row], pooling: str, report: Report, stage: str
) -> Iterator[tuple[list[int], Tensor]]:
    """Yield (indices of rows, their pooled states (watches, rows, d) in float32 on the CPU) of each batch.

    The rows of a batch have the same length and the same number of tokens that are not pooled, so that no padding is
    needed.
    """
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index, (ids, skipped) in enumerate(rows):
        groups[len(ids), skipped].append(index)
    device, over_tokens = input_device(model), _OVER_TOKENS[pooling]
    done, count, first = 0, 0, 0
    states: dict[int, Tensor] = {}

    def pool(watch: int, h: Tensor) -> None:
        # Some models flatten (rows, tokens, d) before the FFN.
        h = h.detach().float().reshape(count, -1, h.shape[-1])[:, first:]
        states[watch] = over_tokens(h).cpu()

    with ExitStack() as stack:
        if model.get_output_embeddings() is not None:
            stack.enter_context(only_scored(model, torch.zeros(1, dtype=torch.long)))  # no logits are needed
        for index, watch in enumerate(watches):
            stack.callback(watch(partial(pool, index)).remove)
        for (_, first), group in groups.items():  # noqa: B007 (read by `pool`)
            for start in range(0, len(group), _ROWS):
                indices = group[start : start + _ROWS]
                count = len(indices)
                with torch.no_grad():
                    model(input_ids=torch.tensor([rows[index][0] for index in indices], device=device), use_cache=False)
                done += count
                report(stage, done, len(rows))
                yield indices, torch.stack([states[index] for index in range(len(watches))])


def residual_norms(model: nn.Module, tokenizer: Any, ffns: Sequence[FFN | MixtureFFN]) -> Tensor:
    """Return the median norm of the residual stream after the layer of each FFN over the neutral texts: (layers,)."""
    device = input_device(model)
    norms: list[list[Tensor]] = [[] for _ in ffns]

    def collect(layer: int, h: Tensor) -> None:
        norms[layer].append(h.detach().float().norm(dim=-1).flatten().cpu())

    with ExitStack() as stack, torch.no_grad():
        for index, watch in enumerate(output_watches(model, ffns)):
            stack.callback(watch(partial(collect, index)).remove)
        for line in neutral_texts():
            model(input_ids=torch.tensor([encode(tokenizer, line).ids], device=device), use_cache=False)
    return torch.stack([torch.cat(layer).median() for layer in norms])


def output_norms(session: Session) -> Tensor:
    """Return the norm of an addition to each FFN's output that moves the residual stream by its median norm: (layers,).

    It is that median norm itself if the FFN's output is added to the residual stream unchanged.
    """
    base = session.base
    ids = torch.tensor([encode(base.tokenizer, neutral_texts()[0]).ids], device=input_device(base.model))
    with session.bare():
        gains = residual_gains(base.model, session.ffns, ids)
        norms = residual_norms(base.model, base.tokenizer, session.ffns)
    # An FFN without effect on the residual stream has no gain to divide by.
    return norms / torch.where(gains.isfinite() & (gains > 0), gains, torch.ones_like(gains))
