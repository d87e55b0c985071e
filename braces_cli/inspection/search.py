"""Search for the vectors that promote a concept or an attribute most, in the model itself.

For a concept, rank and score are those of `inspection.maps`. For an attribute, the layers are those that steering
changes at s = 1. The score of a value vector is its relevance r_c to the attribute's state h_c if steering goes through
the adapter. A steering vector x is added to the FFN output, and the scores are the weights of least norm with this
sum: W_V^T (W_V W_V^T)^-1 x.
"""

import math
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from braces_cli.core.adapter.layer import RelevanceModule
from braces_cli.core.adapter.model import Session
from braces_cli.core.attributes.hooks import LayerSteering, layer_steering
from braces_cli.core.attributes.vector import Attribute
from braces_cli.core.errors import ConfigError
from braces_cli.core.models.ffn import FFN, MixtureFFN
from braces_cli.core.models.weights import double
from braces_cli.core.progress import Report, silent
from braces_cli.inspection.maps import Concept, best_first
from braces_cli.inspection.vocabulary import LogitLens, plain_ffns, vector_blocks


def relevance_modules(session: Session) -> dict[int, RelevanceModule]:
    """The adapter's module in each adapted layer; empty without an adapter."""
    return {} if session.adapter is None else {ffn.layer: module for ffn, module in session.adapter.adapted_ffns}


def top_vectors_for_concept(
    lens: LogitLens,
    ffns: Sequence[FFN | MixtureFFN],
    concept: Concept,
    *,
    limit: int = 20,
    top_k: int = 10,
    report: Report = silent,
) -> list[dict[str, Any]]:
    """Rows `{layer, index, rank, score, tokens}` of the vectors that promote a concept most, best first."""
    tokens = concept.tokens
    best: list[dict[str, Any]] = []
    for number, ffn in enumerate(ffns):
        report("searching value vectors, layers", number, len(ffns))
        for start, block in vector_blocks(ffn):
            # The rank of a concept is at least the least rank of its tokens.
            ranks, scores = lens.ranks(block, tokens, best[-1]["rank"] if len(best) == limit else math.inf)
            for index, (r, s) in enumerate(zip(ranks.tolist(), scores.tolist(), strict=True)):
                rank, score = concept.measure({token: (r[i], s[i]) for i, token in enumerate(tokens)})
                row = {"layer": ffn.layer, "index": start + index, "rank": rank, "score": score}
                best.append(row | {"vector": block[index]})
            # Cloned: a view would keep the dense copy of a packed weight alive.
            best = [row | {"vector": row["vector"].clone()} for row in sorted(best, key=best_first)[:limit]]
    return _with_tokens(lens, best, top_k)


def _with_tokens(lens: LogitLens, rows: list[dict[str, Any]], top_k: int) -> list[dict[str, Any]]:
    """The rows with the `tokens` of each `vector`."""
    vectors = torch.stack([row.pop("vector").to(lens.device) for row in rows])
    listed = lens.best_tokens(vectors, top_k)
    return [row | {"tokens": tokens} for row, tokens in zip(rows, listed, strict=True)]


def attribute_relevance(session: Session, steering: LayerSteering) -> Tensor:
    """Relevance of every value vector of one layer to what steering adds there, (d_ff,) in float32."""
    values = steering.ffn.value_matrix().detach()
    if steering.shift is None:
        wide = double(values)
        gram = wide @ wide.mT
        # A small ridge, for value vectors that do not span the hidden space.
        gram.diagonal().add_(1e-12 * gram.diagonal().mean())
        return (wide.mT @ torch.linalg.solve(gram, steering.total[0].to(wide))).to(values.device, torch.float32)
    module = relevance_modules(session)[steering.layer]
    with torch.no_grad():
        return module.scores(steering.shift.float(), values)[0]


def top_vectors_for_attribute(
    session: Session,
    lens: LogitLens,
    attribute: Attribute,
    layers: Collection[int] | None = None,
    *,
    limit: int = 20,
    top_k: int = 10,
) -> list[dict[str, Any]]:
    """Rows `{layer, index, score, tokens}` of the value vectors most relevant to an attribute, best first.

    Args:
        layers: as in `layer_steering`.

    Raises:
        ConfigError: the attribute changes nothing in these layers.
        ModelError: the model is a mixture of experts.
    """
    plain_ffns(session.ffns)
    rows: list[dict[str, Any]] = []
    for steering in layer_steering(session, [(attribute, 1.0)], layers):
        scores, values = attribute_relevance(session, steering), steering.ffn.value_matrix().detach()
        best = scores.topk(min(limit, len(scores)))
        for score, index in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            rows.append({"layer": steering.layer, "index": index, "score": score, "vector": values[:, index].clone()})
    if not rows:
        raise ConfigError("steering adds nothing in these layers", where="--layers", hint="Leave --layers out.")
    rows.sort(key=lambda row: -row["score"])
    return _with_tokens(lens, rows[:limit], top_k)
