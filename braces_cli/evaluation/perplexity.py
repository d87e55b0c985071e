"""The `perplexity` task: perplexity of a model on texts of the user's own.

    word_perplexity   exp(nll / words)       words as lm-eval counts them: what white space separates
    byte_perplexity   exp(nll / bytes)       bytes of the UTF-8 text
    bits_per_byte     nll / bytes / ln 2
    token_perplexity  exp(nll / tokens)      depends on the tokenizer; not for comparing models

Each document follows exactly one start token; lm-eval's own rolling log-likelihood can put two. Documents are plain
texts, so no chat template is applied.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from braces_cli.core.attributes.intervention import steered
from braces_cli.core.models.tokenization import context_length
from braces_cli.core.utils.distributed import Processes
from braces_cli.core.utils.numbers import safe_exp
from braces_cli.core.utils.progress import Report, silent
from braces_cli.evaluation.native_tasks import NativeTask, TaskContext, TaskResult
from braces_cli.evaluation.oom_backoff import halving
from braces_cli.evaluation.task_rows import read_texts
from braces_cli.scoring.confidence_intervals import rate_error
from braces_cli.scoring.likelihood import text_likelihoods

# metric -> (units it divides by, value of nats per unit, derivative of that value)
_METRICS: dict[str, tuple[str, Callable[[float], float], Callable[[float], float]]] = {
    "word_perplexity": ("words", safe_exp, safe_exp),
    "byte_perplexity": ("bytes", safe_exp, safe_exp),
    "bits_per_byte": ("bytes", lambda rate: rate / math.log(2), lambda rate: 1 / math.log(2)),
    "token_perplexity": ("tokens", safe_exp, safe_exp),
}


def measure(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    batch_size: int,
    report: Report = silent,
    processes: Processes | None = None,
) -> TaskResult:
    """Perplexities over all `texts`, and negative log-likelihoods in nats and units document by document."""
    window = context_length(model.config, tokenizer)
    likelihoods = (processes or Processes()).share_out(
        texts, lambda part: text_likelihoods(model, tokenizer, part, window, batch_size, report)
    )
    nats = [each.nll for each in likelihoods]
    counts: dict[str, list[float]] = {
        "words": [float(len(re.split(r"\s+", text))) for text in texts],
        "bytes": [float(len(text.encode())) for text in texts],
        "tokens": [float(each.tokens) for each in likelihoods],
    }
    result = TaskResult({}, {}, batch_size=batch_size)
    for metric, (unit, value, slope) in _METRICS.items():
        rate = sum(nats) / sum(counts[unit]) if sum(counts[unit]) else math.nan
        error = rate_error(nats, counts[unit])
        stderr = None if error is None else slope(rate) * error
        result.results[metric] = {"value": value(rate), "stderr": stderr, "n": len(texts)}
        result.documents[metric] = dict(enumerate(nats))
        result.units[metric] = dict(enumerate(counts[unit]))
    result.samples = {index: {"prompt": "", "answer": text} for index, text in enumerate(texts)}
    return result


def _measure_task(context: TaskContext, texts: Sequence[str]) -> TaskResult:
    base = context.session.base

    def report(_: str, done: int, total: int | None) -> None:
        context.report(context.stage, done, total)

    with steered(context.session, context.terms):
        result, _ = halving(
            lambda size: measure(base.model, base.tokenizer, texts, size, report, context.processes),
            context.batch_size,
            context.stage,
        )
    return result


PERPLEXITY = NativeTask(
    "perplexity", read_texts, _measure_task, dict.fromkeys(_METRICS, False), ".txt, or rows with `text`"
)
