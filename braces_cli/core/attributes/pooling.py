"""What an attribute's words or texts have in common inside a base: the inputs of its FFNs, pooled to one a layer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from braces_cli.core.attributes.word_lists import POOLINGS
from braces_cli.core.models.ffn import FFN
from braces_cli.core.models.loading import input_device
from braces_cli.core.models.moe import MixtureFFN
from braces_cli.core.models.tokenization import context_length, encode, encode_word
from braces_cli.core.utils.errors import ConfigError
from braces_cli.core.utils.progress import Report, silent

# One for each of POOLINGS: over the tokens of each word or text, (rows, tokens, d) -> (rows, d).
_OVER_TOKENS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda h: h.mean(dim=1),
    "last": lambda h: h[:, -1],
    "max": lambda h: h.amax(dim=1),
}
_ROWS = 64


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
    room, special = context_length(model.config, tokenizer), set(tokenizer.all_special_ids)
    rows = []
    for text in texts:
        ids = encode(tokenizer, text, max_length=room).ids
        rows.append((ids, next((place for place, token in enumerate(ids) if token not in special), 0)))
    return _pool(model, ffns, rows, pooling, report, "pooling texts")


def _pool(
    model: nn.Module,
    ffns: Sequence[FFN | MixtureFFN],
    rows: Sequence[tuple[list[int], int]],
    pooling: str,
    report: Report,
    stage: str,
) -> Tensor:
    """Pool token rows, each without its first few; rows of one length share a batch, so there is no padding."""
    if pooling not in _OVER_TOKENS:
        raise ConfigError(f"no pooling `{pooling}`", where="--pooling", hint=f"One of {', '.join(POOLINGS)}.")
    groups: dict[tuple[int, int], list[list[int]]] = defaultdict(list)
    for ids, skipped in rows:
        if ids:
            groups[len(ids), skipped].append(ids)
    device = input_device(model)
    total = torch.zeros(len(ffns), ffns[0].hidden_size)
    sums = _Sums(_OVER_TOKENS[pooling])
    done = 0
    with ExitStack() as stack:
        for index, ffn in enumerate(ffns):
            stack.callback(ffn.watch(sums.watcher(index, ffn.hidden_size)).remove)
        for (_, sums.skipped), group in groups.items():
            for start in range(0, len(group), _ROWS):
                batch = torch.tensor(group[start : start + _ROWS], device=device)
                sums.rows = len(batch)
                with torch.no_grad():
                    model(input_ids=batch, use_cache=False)
                total += torch.stack([sums.seen[index] for index in range(len(ffns))])
                done += len(batch)
                report(stage, done, len(rows))
    return total / max(done, 1)


class _Sums:
    """What the layers saw in the last pass, pooled over tokens and summed over rows, (d,) each."""

    def __init__(self, over_tokens: Callable[[Tensor], Tensor]) -> None:
        self.rows = 0
        self.skipped = 0
        self.seen: dict[int, Tensor] = {}
        self._over_tokens = over_tokens

    def watcher(self, index: int, width: int) -> Callable[[Tensor], None]:
        def watch(h: Tensor) -> None:
            # (rows, tokens, d), also where a model flattens its tokens before the FFN.
            h = h.detach().float().reshape(self.rows, -1, width)[:, self.skipped :]
            self.seen[index] = self._over_tokens(h).sum(dim=0).cpu()

        return watch
