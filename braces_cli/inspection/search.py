"""Relevance scores of value vectors, written out: what the adapter's low-rank form never builds.

Which vectors promote a concept, or an attribute, most: computed from the model itself.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor

from braces_cli.core.adapter.layer import RelevanceModule
from braces_cli.core.adapter.model import Session
from braces_cli.core.attributes.vector import Attribute
from braces_cli.core.errors import ConfigError
from braces_cli.core.models.ffn import FFN, MixtureFFN
from braces_cli.core.models.tokenize import encode_word, token_text
from braces_cli.core.models.weights import compute_device
from braces_cli.core.progress import Report, silent
from braces_cli.inspection.maps import Concept, Vocabulary, best_first, concept
from braces_cli.inspection.vocabulary import VECTORS_AT_ONCE, LogitLens, TokenTexts, best_tokens, plain_ffns, stacks


def relevance_module(session: Session, ffn: FFN) -> RelevanceModule | None:
    """The adapter's module at an FFN, None where there is none."""
    adapted = session.adapter.adapted_ffns if session.adapter is not None else []
    return next((module for each, module in adapted if each.layer == ffn.layer), None)


def relevance_scores(module: RelevanceModule, h: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Relevance r, and what is added to the activation weights, of every value vector: (n, d_ff) each, in float32.

    Args:
        h: FFN inputs, or hidden states of attributes, (n, d).
        values: W_V (d, d_ff).
    """
    with torch.no_grad():
        scores = module.relevance_scores(h, values)
        return scores, module.g.to(scores) * scores


def vocabulary(session: Session) -> Vocabulary:
    """Texts of all tokens of the open model."""
    size = LogitLens(session.base.model).vocabulary
    return Vocabulary([token_text(session.base.tokenizer, token) for token in range(size)])


def model_concept(session: Session, words: list[str]) -> Concept:
    """The tokens of some words in the open model.

    Raises:
        ConfigError: a word that its tokenizer cannot write.
    """
    tokenizer = session.base.tokenizer

    def split(word: str) -> list[int]:
        ids = encode_word(tokenizer, word)
        # A tokenizer that cannot write a character names it unknown or leaves it out.
        return ids if tokenizer.decode(ids).strip() == word else []

    return concept(words, vocabulary(session), split)


def _chosen(session: Session, layers: Collection[int] | None) -> list[FFN]:
    return [ffn for ffn in plain_ffns(session.ffns) if layers is None or ffn.layer in layers]


def _blocks(ffn: FFN | MixtureFFN, side: str) -> Iterator[tuple[int, Tensor]]:
    for first, matrix in stacks(ffn, side):
        for number, block in enumerate(matrix.split(VECTORS_AT_ONCE)):
            yield first + number * VECTORS_AT_ONCE, block


def top_vectors_for_concept(
    session: Session,
    requested: Concept,
    *,
    layers: Collection[int] | None = None,
    side: str = "value",
    limit: int = 20,
    top_k: int = 10,
    report: Report = silent,
) -> list[dict[str, Any]]:
    """Rows `{layer, index, rank, score, tokens}` of the vectors that promote a concept most, best first.

    See `inspection.maps` for rank and score. Reads every vector over the whole vocabulary, as a map does.
    """
    lens = LogitLens(session.base.model)
    tokens = requested.tokens
    best: list[dict[str, Any]] = []
    chosen = [ffn for ffn in session.ffns if layers is None or ffn.layer in layers]
    total, done = sum(ffn.value_vectors for ffn in chosen), 0
    for ffn in chosen:
        for start, block in _blocks(ffn, side):
            done += len(block)
            ranks, scores = lens.ranks(block, tokens)
            for index, (r, s) in enumerate(zip(ranks.tolist(), scores.tolist(), strict=True), start):
                rank, score = requested.measure({t: (r[i], s[i]) for i, t in enumerate(tokens)})
                best.append({"layer": ffn.layer, "index": index, "rank": rank, "score": score})
            best = sorted(best, key=best_first)[:limit]
            report(f"searching {side} vectors", done, total)
    return _with_tokens(session, best, side, top_k)


def _vectors(session: Session, rows: list[dict[str, Any]], side: str) -> Tensor:
    by_layer = {ffn.layer: ffn for ffn in session.ffns}
    requested = [(by_layer[row["layer"]], row["index"]) for row in rows]
    vectors: dict[tuple[int, int], Tensor] = {}
    for ffn in dict.fromkeys(ffn for ffn, _ in requested):
        indices = [index for other, index in requested if other is ffn]
        for start, block in _blocks(ffn, side):
            vectors |= {(ffn.layer, i): block[i - start] for i in indices if start <= i < start + len(block)}
    device = compute_device(session.base.model.get_output_embeddings())
    return torch.stack([vectors[ffn.layer, index].to(device) for ffn, index in requested])


def _with_tokens(session: Session, rows: list[dict[str, Any]], side: str, top_k: int) -> list[dict[str, Any]]:
    """The rows with their vectors' `tokens`."""
    texts = TokenTexts(session.base.tokenizer)
    listed = best_tokens(LogitLens(session.base.model), texts, _vectors(session, rows, side), top_k)
    return [row | {"tokens": tokens} for row, tokens in zip(rows, listed, strict=True)]


def attribute_relevance(session: Session, attribute: Attribute, ffn: FFN) -> Tensor | None:
    """r_c of every value vector of one layer, (d_ff,) in float32; None where no relevance module sits.

    With an adapter the relevance to h_c. Without one what steering adds is scale * p, so the weight of v_j in
    it, among all weights with this sum those of least norm, stands for its relevance.
    """
    row = attribute.layers.index(ffn.layer)
    values, state = ffn.value_matrix(), attribute.state[row]
    with torch.no_grad():
        if session.adapter is None:
            direction = attribute.steering_direction[row].to(values.device, torch.float64)
            return _least_norm_weights(values, float(attribute.scale[row]) * direction[:, None])[:, 0].float()
        module = relevance_module(session, ffn)
        if module is None:
            return None
        hidden = session.adapter.states(state).to(module.weight)
        # Of each expert on its own, as the adapter scores them.
        scores = [relevance_scores(module, hidden[None], rows.mT)[0][0] for _, rows in stacks(ffn, "value")]
        return torch.cat(scores)


def top_vectors_for_attribute(
    session: Session,
    attribute: Attribute,
    *,
    layers: Collection[int] | None = None,
    limit: int = 20,
    top_k: int = 10,
) -> list[dict[str, Any]]:
    """Rows `{layer, index, score, tokens}` of the value vectors of the highest relevance to an attribute, best first;
    `score` is r_c.

    Raises:
        ConfigError: the adapter has no relevance module in the chosen layers.
    """
    rows: list[dict[str, Any]] = []
    for ffn in _chosen(session, layers):
        scores = attribute_relevance(session, attribute, ffn)
        if scores is not None:
            best = scores.topk(min(limit, len(scores)))
            for score, index in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                rows.append({"layer": ffn.layer, "index": index, "score": score})
    if not rows:
        hint = "`braces inspect --adapter ADAPTER` lists its layers."
        raise ConfigError("the adapter has nothing in these layers", where="--layers", hint=hint)
    rows.sort(key=lambda row: (-row["score"], row["layer"], row["index"]))
    return _with_tokens(session, rows[:limit], "value", top_k)


def _least_norm_weights(values: Tensor, x: Tensor) -> Tensor:
    """Of all weights u with W_V u = x those of least norm, W_V^T (W_V W_V^T)^-1 x: (d_ff, n) in float64.

    For W_V (d, d_ff) and x (d, n). Where value vectors do not span the whole width, W_V u comes as near to x as it can.
    """
    wide = values.detach().double()
    square = wide @ wide.mT
    # The smallest of ridges, for value vectors that do not span.
    square.diagonal().add_(1e-12 * square.diagonal().mean())
    return wide.mT @ torch.linalg.solve(square, x.to(wide))
