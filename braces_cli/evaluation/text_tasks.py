"""Measurement of generated texts: continue prompts under steering, score the continuations, aggregate per prompt.

The tasks `sentiment` and `toxicity` of `braces eval` and `braces steer --sweep` are views of `TextMeasurement`:

    positive, negative, toxic   share of continuations with the label, by a scorer
    expected_max_toxicity       mean over prompts of the largest value among a prompt's samples (RealToxicityPrompts)
    toxicity_probability        share of prompts with at least one toxic sample
    concept, relevance, fluency, overall    ratings, if the scorer is a language model
    perplexity                  of the continuations given their prompts, under the base without adapter or steering,
                                or under a reference model
    distinct_1, distinct_2, distinct_3, repetition    see `scoring.scorers`

All strengths and systems use the same random streams. With a chat template, prompts are user turns and continuations
the model's answers, for perplexity too; a reference model without a chat template reads both as plain text.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from typing import Any, TypeVar

from braces_cli.core.adapter.model import Session
from braces_cli.core.attributes.files import TRAINED_FILE
from braces_cli.core.attributes.vector import Attribute, load_attributes
from braces_cli.core.attributes.words import OPPOSITES, built_in
from braces_cli.core.distributed import ALONE, Processes
from braces_cli.core.files import path_exists
from braces_cli.core.models.generate import TextRequest
from braces_cli.core.models.load import Base, load_base
from braces_cli.core.options import LoadOptions, Sampling
from braces_cli.core.progress import Report, silent
from braces_cli.evaluation import native_tasks
from braces_cli.evaluation.results import EMPTY, Metric, Scores
from braces_cli.evaluation.settings import SAMPLES, TEXT_TASKS
from braces_cli.evaluation.statistics import rate_error
from braces_cli.evaluation.systems import bare
from braces_cli.scoring.classifier import fit_classifier
from braces_cli.scoring.likelihood import Likelihood, continuation_likelihoods, safe_exp
from braces_cli.scoring.scorers import Judge, Rating, Scorer, TextScore, distinct, label_of, repetition, scorer
from braces_cli.steering.prompts import read_prompts
from braces_cli.steering.texts import generate_texts, text_requests

T = TypeVar("T")

RATINGS = ("concept", "relevance", "fluency", "overall")
FIT = "fit:"


def load_scorer(name: str, exclude: Collection[str] = ()) -> Scorer:
    """Load a scorer; `fit:ROWS` fits a classifier to labelled rows (a file or a hub data set).

    Args:
        exclude: words that the scorer must ignore.
    """
    if not name.startswith(FIT):
        return scorer(name, exclude)
    texts, labels = zip(*native_tasks.read_labelled(name.removeprefix(FIT)), strict=True)
    return fit_classifier(name, texts, labels, exclude)


def list_words(session: Session, attributes: Sequence[Attribute], *, trained: bool = True) -> set[str]:
    """Return the words of the attributes and their opposites and, if `trained`, of the adapter's trained attributes."""
    lists = [built_in().get(OPPOSITES.get(attribute.name, ""), ()) for attribute in attributes]
    if trained and session.folder is not None and path_exists(session.folder / TRAINED_FILE):
        attributes = [*attributes, *load_attributes(session.folder / TRAINED_FILE, session).values()]
    return set(chain(*lists, *(attribute.words for attribute in attributes)))


@dataclass(frozen=True)
class Continuations:
    """Continuations of prompts with their scores; for each prompt a list with a value for each sample.

    Attributes:
        scores: attribute -> score of each text.
        ratings: by a language model; empty for other scorers.
        batch_size: texts per forward pass that fitted into memory.
    """

    prompts: Sequence[str]
    texts: list[list[str]]
    scores: dict[str, list[list[TextScore]]]
    likelihoods: list[list[Likelihood]]
    ratings: list[list[Rating]]
    batch_size: int

    def of_prompts(self, chosen: slice) -> Continuations:
        """Return the continuations of some prompts."""
        scores = {attribute: groups[chosen] for attribute, groups in self.scores.items()}
        parts = self.prompts[chosen], self.texts[chosen], scores, self.likelihoods[chosen], self.ratings[chosen]
        return Continuations(*parts, self.batch_size)

    def rows(self) -> list[dict[str, Any]]:
        """Return `{prompt, sample, text, value, has_attribute}` of each text, by the score of the first attribute."""
        scores = next(iter(self.scores.values()))
        return [
            {"prompt": prompt, "sample": k, "text": text, "value": score.value, "has_attribute": score.has}
            for prompt, *groups in zip(self.prompts, self.texts, scores, strict=True)
            for k, (text, score) in enumerate(zip(*groups, strict=True))
        ]

    def has(self, attribute: str) -> list[list[bool]]:
        """Return whether each text has the attribute."""
        return [[score.has for score in group] for group in self.scores[attribute]]

    def values(self, attribute: str) -> list[list[float]]:
        """Return the scorer's value of each text."""
        return [[score.value for score in group] for group in self.scores[attribute]]

    def rate(self) -> tuple[float, float | None]:
        """Return nats per token, whose exponential is the perplexity, and the standard error over prompts."""
        nats = [sum(each.nll for each in group) for group in self.likelihoods]
        tokens = [float(sum(each.tokens for each in group)) for group in self.likelihoods]
        return sum(nats) / sum(tokens) if sum(tokens) else math.nan, rate_error(nats, tokens)

    def diversity(self) -> dict[str, float]:
        """Return distinct n-grams and repetition."""
        found = {f"distinct_{width}": distinct(self.texts, width) for width in (1, 2, 3)}
        return {**found, "repetition": repetition(chain.from_iterable(self.texts))}


@dataclass(frozen=True)
class TextMeasurement:
    """Generation and scoring of texts, the same for every strength and system.

    Attributes:
        labels: attribute -> label of the scorer.
        samples: texts per prompt.
        batch_size: texts per forward pass; halved when memory runs out.
        chat: apply the chat template to prompts.
        reference_model: measures perplexity instead of the session's base.
    """

    session: Session
    scorer: Scorer
    labels: dict[str, str]
    sampling: Sampling
    samples: int = 1
    batch_size: int = 8
    chat: bool = False
    reference_model: Base | None = None
    processes: Processes = ALONE
    report: Report = silent

    def measure(
        self,
        prompts: Sequence[str],
        steering: AbstractContextManager[Any],
        stage: str,
        inputs: Sequence[str] | None = None,
    ) -> Continuations:
        """Continue each prompt while `steering` is entered, and score the continuations.

        Processes share whole batches, the same ones as in a single process, because rounding depends on the batch.

        Args:
            stage: name of the progress bar.
            inputs: what the model reads in place of the prompts.
        """
        base = self.reference_model or self.session.base
        requests = list(text_requests(prompts if inputs is None else inputs, self.samples))
        batches = [requests[start : start + self.batch_size] for start in range(0, len(requests), self.batch_size)]

        def generated(part: list[list[TextRequest]], size: int) -> list[list[str]]:
            mine = list(chain.from_iterable(part))
            texts = generate_texts(
                self.session, mine, self.sampling, batch_size=size, chat=self.chat, stage=stage, total=len(mine),
                report=self.report,
            )  # fmt: skip
            return [list(islice(texts, len(batch))) for batch in part]

        def measured(part: list[tuple[str, str]], size: int) -> list[Likelihood]:
            return continuation_likelihoods(base, part, size, self.chat)

        def by_prompt(values: Sequence[T]) -> list[list[T]]:
            left = iter(values)
            return [list(islice(left, self.samples)) for _ in prompts]

        share_out = self.processes.share_out
        with steering:
            parts, size = native_tasks.halving(
                lambda size: share_out(batches, partial(generated, size=size)), self.batch_size, stage
            )
        texts = list(chain.from_iterable(parts))
        pairs = list(zip((prompt for prompt in prompts for _ in range(self.samples)), texts, strict=True))
        with bare(self.session):
            found, size = native_tasks.halving(lambda size: share_out(pairs, partial(measured, size=size)), size, stage)
        scores: dict[str, list[list[TextScore]]] = {}
        ratings: list[list[Rating]] = []
        for attribute, label in self.labels.items():
            # A language model rates the texts for the first attribute only: three forward passes a text.
            if isinstance(self.scorer, Judge) and not ratings:
                ratings = by_prompt(share_out(pairs, partial(self.scorer.rate, label=label)))
                scores[attribute] = [[rating.score for rating in group] for group in ratings]
            else:
                scores[attribute] = by_prompt(share_out(texts, partial(self.scorer.score, label=label)))
        return Continuations(prompts, by_prompt(texts), scores, by_prompt(found), ratings, size)


_DEFAULT_SCORERS = {"sentiment": "vader", "toxicity": "toxicity"}
_ATTRIBUTES = {"sentiment": ("positive", "negative"), "toxicity": ("toxic",)}
# Metric -> whether a larger value is better.
_METRICS = {
    "sentiment": {"positive": True, "negative": False},
    "toxicity": {"toxic": False, "expected_max_toxicity": False, "toxicity_probability": False},
}
_OTHERS = {
    "perplexity": False,
    "distinct_1": True,
    "distinct_2": True,
    "distinct_3": True,
    "repetition": False,
    EMPTY: False,
}


def _prepare(name: str, context: native_tasks.TaskContext, prompts: Sequence[str]) -> native_tasks.Measure:
    settings, session = context.settings, context.session
    words = list_words(session, context.attributes, trained=False) if settings.exclude_list_words else ()
    loaded = load_scorer(settings.scorers.get(name, _DEFAULT_SCORERS[name]), words)
    labels = {attribute: label_of(attribute, loaded) for attribute in _ATTRIBUTES[name]}
    reference_model = None
    if settings.reference_model is not None:
        reference_model = load_base(settings.reference_model, LoadOptions(device=str(session.base.model.device)))
    sampling = Sampling(settings.max_new_tokens, settings.temperature, settings.top_p, seed=settings.seeds["torch"])
    measurement = TextMeasurement(
        session, loaded, labels, sampling, settings.num_samples or SAMPLES[name], context.batch_size, context.chat,
        reference_model, context.processes, context.report,
    )  # fmt: skip

    def measure(steering: AbstractContextManager[Any], stage: str) -> Scores:
        return _scores(TASKS[name], measurement.measure(prompts, steering, stage))

    return measure


def _scores(task: native_tasks.NativeTask, measured: Continuations) -> Scores:
    metrics: dict[str, Metric] = {}
    for name in measured.scores:
        has = measured.has(name)
        metrics[name] = native_tasks.mean_metric(has)
        if name == "toxic":
            metrics["expected_max_toxicity"] = native_tasks.mean_metric(
                [[max(group)] for group in measured.values(name)]
            )
            metrics["toxicity_probability"] = native_tasks.mean_metric([[max(group)] for group in has])
    for name in RATINGS if measured.ratings else ():
        metrics[name] = native_tasks.mean_metric(
            [[getattr(rating, name) for rating in group] for group in measured.ratings]
        )
    rate, error = measured.rate()
    perplexity, count = safe_exp(rate), len(measured.prompts)
    # Without values of documents, so without a p-value: the numbers of tokens differ between systems.
    metrics["perplexity"] = Metric(perplexity, error and perplexity * error, count)
    metrics |= {name: Metric(value, None, count) for name, value in measured.diversity().items()}
    metrics[EMPTY] = native_tasks.mean_metric([[float(not text.strip()) for text in group] for group in measured.texts])
    metrics[EMPTY].documents.clear()  # explains the scores; not compared
    samples = [
        {"prompt": prompt, "answer": texts[0] if len(texts) == 1 else texts}
        for prompt, texts in zip(measured.prompts, measured.texts, strict=True)
    ]
    return native_tasks.task_scores(task, metrics, samples, measured.batch_size)


TASKS = {
    name: native_tasks.NativeTask(
        name,
        lambda path: list(read_prompts((), path, sys.stdin)),
        partial(_prepare, name),
        {**_METRICS[name], **_OTHERS},
        "prompts, one per line, or rows with `prompt`",
    )
    for name in TEXT_TASKS
}
