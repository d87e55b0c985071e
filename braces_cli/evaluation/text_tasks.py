"""The tasks `sentiment` and `toxicity`: continue prompts, steered where asked, and score the continuations.

    positive, negative, toxic   share of continuations that have the label, by a scorer
    expected_max_toxicity       mean over prompts of the largest value of a prompt's samples (RealToxicityPrompts)
    toxicity_probability        share of prompts with at least one toxic sample
    concept, relevance, fluency, overall    ratings by a judge model, where one is the scorer
    perplexity                  of the continuations given their prompts, under the bare base or a judge model
    distinct_1, _2, _3          see `scoring.scorers`
    repetition

A document is a prompt; its value is the mean over its samples. All systems draw from the same random streams. With a
chat template, a prompt is the user's turn and the continuation the model's answer, for perplexity too; a judge model
without a chat template reads both as plain text.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from braces_cli.core.attributes.hooks import steered
from braces_cli.core.models.generate import TextRequest
from braces_cli.core.models.load import Base, load_base
from braces_cli.core.options import LoadOptions, Sampling
from braces_cli.core.text import safe_exp
from braces_cli.evaluation.native_tasks import NativeTask, TaskContext, TaskResult, halving, list_words, open_scorer
from braces_cli.evaluation.settings import TEXT_TASKS
from braces_cli.evaluation.statistics import cluster_error, rate_error
from braces_cli.evaluation.sweep import continuation_nll
from braces_cli.scoring.likelihood import Likelihood
from braces_cli.scoring.model_scorers import Rater, Rating, text_score
from braces_cli.scoring.registry import label_of
from braces_cli.scoring.scorers import Scorer, TextScore, distinct, repetition
from braces_cli.steering.prompts import read_prompts
from braces_cli.steering.texts import generate_texts

# Task -> its usual scorer, and the attributes that texts are scored for -> whether more of it is better.
_SCORED: dict[str, tuple[str, dict[str, bool]]] = {
    "sentiment": ("vader", {"positive": True, "negative": False}),
    "toxicity": ("toxicity", {"toxic": False}),
}
# Of the samples of a prompt together.
_WORST = {"expected_max_toxicity": False, "toxicity_probability": False}
_OTHER_METRICS = {
    "perplexity": False,
    **dict.fromkeys(("distinct_1", "distinct_2", "distinct_3"), True),
    "repetition": False,
}


@dataclass(frozen=True)
class _Continuations:
    """Of one prompt: texts, attribute -> score of each text, the likelihood of each text and a judge's ratings."""

    texts: list[str]
    text_scores: dict[str, list[TextScore]]
    likelihoods: list[Likelihood]
    ratings: list[Rating]


@dataclass(frozen=True)
class _Scoring:
    """How continuations are scored: `labels` are the scorer's labels of the attributes."""

    scorer: Scorer
    labels: dict[str, str]
    reference_model: Base | None


def read(path: Path) -> Sequence[str]:
    """Prompts of a file, one a line, or JSON Lines with `prompt`.

    Raises:
        DataError: missing, empty, or a line without a prompt.
    """
    return list(read_prompts((), path, sys.stdin))


def measure(task: str, context: TaskContext, prompts: Sequence[str]) -> TaskResult:
    """Continue every prompt, on every process its share, and score the continuations.

    Raises:
        ConfigError: an unknown scorer.
        DataError: a prompt that the chat template does not take.
        BracesError: the scorer fails.
    """
    settings, session = context.settings, context.session
    words = list_words(session, context.attributes, trained=False) if settings.exclude_list_words else ()
    usual, attributes = _SCORED[task]
    scorer = open_scorer(settings.scorers.get(task, usual), exclude=words)
    reference_model = None
    if settings.reference_model is not None:
        reference_model = load_base(settings.reference_model, LoadOptions(device=str(session.base.model.device)))
    scoring = _Scoring(scorer, {attribute: label_of(attribute, scorer) for attribute in attributes}, reference_model)
    numbered = list(enumerate(prompts))
    continuations, size = halving(
        lambda size: context.processes.share_out(numbered, lambda part: _continue(task, context, part, size, scoring)),
        context.batch_size,
        context.stage,
    )
    return _summary(prompts, continuations, list(attributes), size)


def _continue(
    task: str, context: TaskContext, prompts: Sequence[tuple[int, str]], size: int, scoring: _Scoring
) -> list[_Continuations]:
    """Generate and score the continuations of numbered prompts; `size` is the batch size."""
    session, settings = context.session, context.settings
    samples = settings.samples(task)
    sampling = Sampling(
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        seed=context.seed,
    )
    requests = [TextRequest(prompt, index, sample) for index, prompt in prompts for sample in range(samples)]
    with steered(session, context.terms):
        texts = list(
            generate_texts(
                session,
                requests,
                sampling,
                batch_size=size,
                chat=context.chat_template,
                stage=context.stage,
                total=len(requests),
                report=context.report,
            )
        )
    if not texts:
        return []
    text_scores, ratings = _scored(scoring, [request.prompt for request in requests], texts)
    with _without_peft(session.base.model):
        likelihoods = continuation_nll(
            session, [prompt for _, prompt in prompts], texts, size, scoring.reference_model, context.chat_template
        )
    parts = [slice(start, start + samples) for start in range(0, len(texts), samples)]
    return [
        _Continuations(
            texts[part], {name: each[part] for name, each in text_scores.items()}, likelihoods[part], ratings[part]
        )
        for part in parts
    ]


def _scored(
    scoring: _Scoring, prompts: Sequence[str], texts: Sequence[str]
) -> tuple[dict[str, list[TextScore]], list[Rating]]:
    """Attribute -> score of each text, and a judge model's ratings for the first attribute."""
    scorer, labels = scoring.scorer, dict(scoring.labels)
    if not isinstance(scorer, Rater):
        return {name: scorer.score(texts, label) for name, label in labels.items()}, []
    first = next(iter(labels))
    ratings = scorer.rate(prompts, texts, labels.pop(first))
    rest = {name: scorer.score(texts, label) for name, label in labels.items()}
    return {first: [text_score(rating.concept) for rating in ratings], **rest}, ratings


@contextmanager
def _without_peft(model: Any) -> Iterator[None]:
    """Disable an adapter of peft for perplexity, as `continuation_nll` does with one of braces."""
    layers = [each for each in model.modules() if hasattr(each, "enable_adapters") and hasattr(each, "base_layer")]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def _summary(
    prompts: Sequence[str], continuations: Sequence[_Continuations], attributes: Sequence[str], size: int
) -> TaskResult:
    count = len(prompts)
    results: dict[str, dict[str, Any]] = {}
    documents: dict[str, dict[int, float]] = {}
    for name in attributes:
        groups = [[float(one.has) for one in each.text_scores[name]] for each in continuations]
        _add(results, documents, name, groups)
        if name == "toxic":
            largest = [[max(one.value for one in each.text_scores[name])] for each in continuations]
            _add(results, documents, "expected_max_toxicity", largest)
            _add(results, documents, "toxicity_probability", [[max(group)] for group in groups])
    for name in ("concept", "relevance", "fluency", "overall") if continuations[0].ratings else ():
        _add(results, documents, name, [[getattr(rating, name) for rating in each.ratings] for each in continuations])
    nats = [sum(likelihood.nll for likelihood in each.likelihoods) for each in continuations]
    tokens = [float(sum(likelihood.tokens for likelihood in each.likelihoods)) for each in continuations]
    rate = sum(nats) / sum(tokens) if sum(tokens) else math.nan
    perplexity = safe_exp(rate)
    error = rate_error(nats, tokens)
    results["perplexity"] = {"value": perplexity, "stderr": error and perplexity * error, "n": count}
    texts = [each.texts for each in continuations]
    for width in (1, 2, 3):
        results[f"distinct_{width}"] = {"value": distinct(texts, width), "stderr": None, "n": count}
    repeated = repetition(text for group in texts for text in group)
    results["repetition"] = {"value": repeated, "stderr": None, "n": count}
    samples: dict[int, dict[str, Any]] = {
        index: {"prompt": prompt, "answer": each.texts[0] if len(each.texts) == 1 else each.texts}
        for index, (prompt, each) in enumerate(zip(prompts, continuations, strict=True))
    }
    # Perplexity gets no p-value: each system has its own number of tokens, which a paired test of ratios cannot use.
    return TaskResult(results, documents, {}, samples, size)


def _add(
    results: dict[str, dict[str, Any]],
    documents: dict[str, dict[int, float]],
    name: str,
    groups: Sequence[Sequence[float]],
) -> None:
    """A metric that is the mean over prompts, from the values of the samples of each."""
    means = [sum(group) / len(group) for group in groups]
    results[name] = {"value": sum(means) / len(means), "stderr": cluster_error(groups), "n": len(means)}
    documents[name] = dict(enumerate(means))


def _text_task(name: str) -> NativeTask:
    labels = _SCORED[name][1]
    metrics = {**labels, **(_WORST if "toxic" in labels else {}), **_OTHER_METRICS}
    return NativeTask(name, read, partial(measure, name), metrics, "prompts, one a line, or rows with `prompt`")


SENTIMENT, TOXICITY = map(_text_task, TEXT_TASKS)
