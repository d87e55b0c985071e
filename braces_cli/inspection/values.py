"""Which tokens each value vector promotes: top-k of LM head(final norm(v_j)) (Geva et al., 2022)."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch

from braces_cli.core.encode import token_text
from braces_cli.core.errors import ConfigError
from braces_cli.core.progress import Report, silent
from braces_cli.core.session import Session
from braces_cli.inspection.readout import readout

# Scores of this many vectors over the whole vocabulary are held at a time.
_VECTORS_AT_ONCE = 256


def value_tokens(
    session: Session,
    layers: Collection[int] | None = None,
    indices: Collection[int] | None = None,
    top_k: int = 10,
    report: Report = silent,
) -> Iterator[dict[str, Any]]:
    """Rows `{layer, index, tokens: [{id, token, score}]}`, tokens best first; memory: 256 x vocabulary scores.

    Args:
        layers: decoder layers; None is all.
        indices: value vectors within each layer; None is all.
        top_k: tokens for each vector.

    Raises:
        ConfigError: an index that a chosen layer does not have.
    """
    chosen = [ffn for ffn in session.ffns if layers is None or ffn.layer in layers]
    for ffn in chosen:
        wrong = [index for index in indices or () if not 0 <= index < ffn.value_vectors]
        if wrong:
            hint = f"Layer {ffn.layer} has value vectors 0 to {ffn.value_vectors - 1}."
            raise ConfigError(f"no value vector {wrong[0]}", where="--index", hint=hint)
    score = readout(session.base.model)
    tokenizer = session.base.tokenizer
    total = sum(len(indices) if indices is not None else ffn.value_vectors for ffn in chosen)
    done = 0
    for ffn in chosen:
        matrix = ffn.value_matrix()  # once a layer: where it is packed, this is what unpacks it
        wanted = torch.tensor(sorted(indices) if indices is not None else range(ffn.value_vectors))
        for block in wanted.split(_VECTORS_AT_ONCE):
            vectors = matrix[:, block.to(matrix.device)].mT
            best = score(vectors).topk(top_k, dim=-1)
            done += len(block)
            report("reading value vectors", done, total)
            for index, values, ids in zip(block.tolist(), best.values.tolist(), best.indices.tolist(), strict=True):
                tokens = [
                    {"id": id_, "token": token_text(tokenizer, id_), "score": value}
                    for id_, value in zip(ids, values, strict=True)
                ]
                yield {"layer": ffn.layer, "index": index, "tokens": tokens}
