"""The `perplexity` task: how surprised a model is by texts of the user's own.

    word_perplexity   exp(nll / words)       words as lm-eval counts them: what white space separates
    byte_perplexity   exp(nll / bytes)       bytes of the UTF-8 text
    bits_per_byte     nll / bytes / ln 2
    token_perplexity  exp(nll / tokens)      depends on the tokenizer; not for comparing models

Each document follows exactly one start token; lm-eval's own rolling log-likelihood can put two.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from braces_cli.core.models.tokenization import context_length
from braces_cli.core.utils.progress import Report, silent
from braces_cli.evaluation.processes import ALONE, Processes
from braces_cli.scoring.likelihood import text_likelihoods

NAME = "perplexity"


def _exp(rate: float) -> float:
    return math.exp(rate) if rate < 700 else math.inf


# metric -> (units it divides by, value of nats a unit, derivative of that value)
_METRICS: dict[str, tuple[str, Callable[[float], float], Callable[[float], float]]] = {
    "word_perplexity": ("words", _exp, _exp),
    "byte_perplexity": ("bytes", _exp, _exp),
    "bits_per_byte": ("bytes", lambda rate: rate / math.log(2), lambda rate: 1 / math.log(2)),
    "token_perplexity": ("tokens", _exp, _exp),
}


@dataclass(frozen=True)
class Measured:
    """Results of one system.

    Attributes:
        results: metric -> `{value, stderr, n}`, n the number of documents.
        nats: metric -> document -> negative log-likelihood in nats.
        units: metric -> document -> what the metric divides by.
    """

    results: dict[str, dict[str, Any]]
    nats: dict[str, dict[int, float]]
    units: dict[str, dict[int, float]]


def measure(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    batch_size: int,
    report: Report = silent,
    processes: Processes = ALONE,
) -> Measured:
    """Perplexities of `texts` in all, and the parts each document has in them."""
    window = context_length(model, tokenizer)
    likelihoods = processes.share_out(
        texts, lambda part: text_likelihoods(model, tokenizer, part, window, batch_size, report)
    )
    nats = [each.nll for each in likelihoods]
    counts: dict[str, list[int]] = {
        "words": [len(re.split(r"\s+", text)) for text in texts],
        "bytes": [len(text.encode()) for text in texts],
        "tokens": [each.tokens for each in likelihoods],
    }
    results, by_document, units = {}, {}, {}
    for metric, (unit, value, slope) in _METRICS.items():
        rate = sum(nats) / sum(counts[unit]) if sum(counts[unit]) else math.nan
        error = _rate_error(nats, counts[unit], rate)
        stderr = None if error is None else slope(rate) * error
        results[metric] = {"value": value(rate), "stderr": stderr, "n": len(texts)}
        by_document[metric] = dict(enumerate(nats))
        units[metric] = dict(enumerate(map(float, counts[unit])))
    return Measured(results, by_document, units)


def _rate_error(nats: Sequence[float], units: Sequence[int], rate: float) -> float | None:
    """Standard error of sum(nats) / sum(units) over documents, by the delta method; None for a single document."""
    count = len(nats)
    if count < 2 or not sum(units):
        return None
    spread = sum((n - rate * u) ** 2 for n, u in zip(nats, units, strict=True))
    return math.sqrt(spread * count / (count - 1)) / sum(units)
