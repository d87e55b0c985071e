"""Which tokens each vector of the FFNs promotes: top-k of LM head(final norm(v_j)) (Geva et al., 2022)."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor

from braces_cli.core.models.ffn import FFN
from braces_cli.core.models.loading import tokenizer_hashes
from braces_cli.core.models.moe import MixtureFFN
from braces_cli.core.models.tokenization import token_text
from braces_cli.core.session import Session
from braces_cli.core.utils.errors import ConfigError
from braces_cli.core.utils.progress import Report, silent
from braces_cli.inspection.ffn_weights import stacks
from braces_cli.inspection.logit_lens import VECTORS_AT_ONCE, LogitLens


class TokenTexts:
    """Texts of tokens, each decoded once: a map names few tokens many times."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}

    def __getitem__(self, token: int) -> str:
        if token not in self._known:
            self._known[token] = token_text(self._tokenizer, token)
        return self._known[token]


def best_tokens(lens: LogitLens, texts: TokenTexts, vectors: Tensor, k: int) -> list[list[dict[str, Any]]]:
    """The k best tokens of each vector (n, d) as `{id, token, score}`, best first."""
    scores, ids = lens.best(vectors, k)
    pairs = zip(ids.tolist(), scores.tolist(), strict=True)
    return [[{"id": t, "token": texts[t], "score": s} for t, s in zip(*row, strict=True)] for row in pairs]


def value_tokens(
    session: Session,
    layers: Collection[int] | None = None,
    indices: Collection[int] | None = None,
    top_k: int = 10,
    report: Report = silent,
    side: str = "value",
) -> Iterator[dict[str, Any]]:
    """Rows `{layer, index, tokens: [{id, token, score}]}`, tokens best first, of equal scores the lower id first.

    In a mixture of experts indices run on from expert to expert. Memory: the scores of 2,048 vectors over 8,192 tokens
    at a time.

    Args:
        layers: decoder layers; None is all.
        indices: vectors within each layer; None is all.
        top_k: tokens for each vector.
        side: `value`, or `gate` or `up`, whose rows read the residual stream instead of writing it.

    Raises:
        ConfigError: an index that a chosen layer does not have, or a side that the model (or `stacks`) does not have.
    """
    chosen = [ffn for ffn in session.ffns if layers is None or ffn.layer in layers]
    for ffn in chosen:
        check_indices(ffn, indices or ())
    lens = LogitLens(session.base.model)
    texts = TokenTexts(session.base.tokenizer)
    total = sum(len(indices) if indices is not None else ffn.value_vectors for ffn in chosen)
    done = 0
    for ffn in chosen:
        requested = torch.tensor(sorted(indices) if indices is not None else range(ffn.value_vectors))
        for start, matrix in stacks(ffn, side):
            inside = requested[(requested >= start) & (requested < start + len(matrix))]
            for block in inside.split(VECTORS_AT_ONCE) if len(inside) else ():
                listed = best_tokens(lens, texts, matrix[(block - start).to(matrix.device)], top_k)
                done += len(block)
                report(f"reading {side} vectors", done, total)
                for index, tokens in zip(block.tolist(), listed, strict=True):
                    yield {"layer": ffn.layer, "index": index, "tokens": tokens}


def check_indices(ffn: FFN | MixtureFFN, indices: Collection[int], where: str = "--index") -> None:
    """Raises:
    ConfigError: an index that the layer does not have.
    """
    wrong = [index for index in indices if not 0 <= index < ffn.value_vectors]
    if wrong:
        hint = f"Layer {ffn.layer} has value vectors 0 to {ffn.value_vectors - 1}."
        raise ConfigError(f"no value vector {wrong[0]}", where=where, hint=hint)


def map_header(session: Session, side: str, top_k: int, adapter: str | None = None) -> dict[str, Any]:
    """What a map file says about itself: `{model, fingerprint, tokenizer, side, top_k, vocabulary}`, the last of
    these the texts of all tokens, so that a reader needs no tokenizer."""
    base = session.base
    size = LogitLens(base.model).vocabulary
    texts = TokenTexts(base.tokenizer)
    return {
        "format_version": 1,
        "model": base.name,
        "revision": base.revision,
        "fingerprint": base.fingerprint(session.ffns),
        "tokenizer": tokenizer_hashes(base.tokenizer),
        "side": side,
        "top_k": min(top_k, size),
        "vocabulary": [texts[token] for token in range(size)],
    }
