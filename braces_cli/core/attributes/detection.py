"""Concept detection: how well an attribute's direction tells texts with the attribute from others (as in AxBench).

A text's score at a layer is the largest projection of a token's FFN input on the direction p. AUROC is the probability
that a random text with the attribute scores higher than a random one without. The layer is chosen on half of the texts
and measured on the other half: the best of many layers looks better than it is on the texts that chose it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from braces_cli.core.attributes.attribute import Attribute
from braces_cli.core.attributes.contrast import area
from braces_cli.core.attributes.pooling import Row, Watch, pooled_batches
from braces_cli.core.models.tokenization import context_length, encode
from braces_cli.core.session import Session
from braces_cli.core.utils.errors import DataError
from braces_cli.core.utils.progress import Report, silent

_Z = 1.959964  # 95 %, two-sided


def detection(
    session: Session, attribute: Attribute, texts: Sequence[str], has: Sequence[bool], report: Report = silent
) -> dict[str, Any]:
    """`{auroc, auroc_stderr, auroc_interval, layer, n, layers: [{layer, auroc}]}` of the open model as it stands.

    `auroc` is that of `layer` on the half of the texts that did not choose it, `layers` have those of all texts. The
    standard error is Hanley and McNeil's.

    Args:
        has: whether each text has the attribute.

    Raises:
        DataError: fewer than two texts with it, or without it.
    """
    sides = [[index for index, flag in enumerate(has) if flag == side] for side in (True, False)]
    if min(map(len, sides)) < 2:
        what = f"{len(sides[0])} texts are `{attribute.name}` and {len(sides[1])} are not"
        raise DataError(what, hint="Detection needs at least two of each.")
    scores = projections(session, attribute, texts, report)

    def auroc(layer: int, half: slice) -> float:
        return area(*(scores[layer, side[half]] for side in sides))

    rows = range(len(attribute.layers))
    best = max(rows, key=lambda row: auroc(row, slice(0, None, 2)))
    other = slice(1, None, 2)
    value, counts = auroc(best, other), [len(side[other]) for side in sides]
    error = area_error(value, *counts)
    return {
        "auroc": value,
        "auroc_stderr": error,
        "auroc_interval": [max(0.0, value - _Z * error), min(1.0, value + _Z * error)],
        "layer": attribute.layers[best],
        "n": sum(counts),
        "layers": [{"layer": attribute.layers[row], "auroc": auroc(row, slice(None))} for row in rows],
    }


def projections(session: Session, attribute: Attribute, texts: Sequence[str], report: Report = silent) -> Tensor:
    """Largest projection of a token's FFN input on p / |p|, (layers, texts); special tokens in front do not count."""
    base = session.base
    max_length, special = context_length(base.model.config, base.tokenizer), set(base.tokenizer.all_special_ids)
    rows: list[Row] = []
    for text in texts:
        ids = encode(base.tokenizer, text, max_length=max_length).ids
        rows.append((ids, next((place for place, token in enumerate(ids) if token not in special), 0)))
    directions = F.normalize(attribute.state, dim=-1)
    watches: list[Watch] = [
        partial(_watch, ffn.watch, directions[attribute.layers.index(ffn.layer)]) for ffn in session.ffns
    ]
    scores = torch.zeros(len(watches), len(rows))
    for indices, pooled in pooled_batches(base.model, watches, rows, "max", report, "reading texts"):
        scores[:, indices] = pooled.squeeze(-1)
    return scores


def _watch(watch: Watch, direction: Tensor, callback: Callable[[Tensor], None]) -> Any:
    """Watch the projections (..., 1) of what is watched."""
    return watch(lambda h: callback(h.detach().float() @ direction.to(h.device).unsqueeze(1)))


def area_error(value: float, positives: int, negatives: int) -> float:
    """Standard error of an AUROC (Hanley and McNeil 1982)."""
    one, two = value / (2 - value), 2 * value**2 / (1 + value)
    spread = value * (1 - value) + (positives - 1) * (one - value**2) + (negatives - 1) * (two - value**2)
    return math.sqrt(max(spread, 0.0) / (positives * negatives))
