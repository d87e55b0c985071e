"""The tasks `sentiment` and `toxicity`: continue prompts, steered where asked, and score what was written.

    positive, negative, toxic   share of continuations that a scorer says are so
    perplexity                  of the continuations given their prompts, under the bare base or a judge model
    distinct_1, _2, _3          see `scoring.diversity`
    repetition

A document is a prompt; its value is the mean over its samples. All systems draw from the same random streams.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from braces_cli.core.attributes.attribute import Attribute, find_attribute
from braces_cli.core.attributes.intervention import steered
from braces_cli.core.models.generation import Sampling, TextRequest
from braces_cli.core.models.load_options import LoadOptions
from braces_cli.core.models.loading import Base, load_base
from braces_cli.evaluation.native_task import Measured, Setting
from braces_cli.evaluation.oom_backoff import halving
from braces_cli.scoring.confidence_intervals import cluster_error, rate_error
from braces_cli.scoring.diversity import distinct, repetition
from braces_cli.scoring.likelihood import Likelihood
from braces_cli.scoring.registry import label_of
from braces_cli.scoring.scorer import Scorer
from braces_cli.steering.generate_texts import generate_texts
from braces_cli.steering.prompts import read_prompts
from braces_cli.steering.scorer_loading import list_words, open_scorer
from braces_cli.steering.sweep import continuation_nll

# Task -> its scorer where none is named, and the attributes it asks that scorer about.
_ASKED = {"sentiment": ("vader", ("positive", "negative")), "toxicity": ("toxicity", ("toxic",))}


@dataclass(frozen=True)
class _Written:
    """What was written for one prompt: texts, for each asked attribute whether each text has it, and likelihoods."""

    texts: list[str]
    has: dict[str, list[bool]]
    likelihoods: list[Likelihood]


def read(path: Path) -> Sequence[str]:
    """Prompts of a file, one a line, or JSON Lines with `prompt`.

    Raises:
        DataError: missing, empty, or a line without a prompt.
    """
    return list(read_prompts((), path, sys.stdin))


def measurer(task: str) -> Callable[[Setting, Sequence[str]], Measured]:
    """What measures one of the two tasks."""
    return lambda setting, prompts: _measure(task, setting, prompts)


def _measure(task: str, setting: Setting, prompts: Sequence[str]) -> Measured:
    """Continue every prompt, on every process its share, and score.

    Raises:
        ConfigError: an unknown attribute or scorer.
        BracesError: the scorer fails.
    """
    ways = setting.generation
    session = setting.session
    terms = [(find_attribute(session, name, ways.attributes_folder), s) for name, s in ways.attributes.items()]
    words = list_words(session, [attribute for attribute, _ in terms], trained=False) if ways.exclude_list_words else ()
    usual, asked = _ASKED[task]
    judge = open_scorer(ways.scorers.get(task, usual), exclude=words)
    labels = {attribute: label_of(attribute, judge) for attribute in asked}
    judge_model = None
    if ways.judge_model is not None:
        judge_model = load_base(ways.judge_model, LoadOptions(device=str(session.base.model.device)))
    numbered = list(enumerate(prompts))
    written, size = halving(
        lambda size: setting.processes.share_out(
            numbered, lambda part: _write(setting, part, size, terms, judge, labels, judge_model)
        ),
        setting.batch_size,
        setting.stage,
    )
    return _summary(prompts, written, asked, size)


def _write(
    setting: Setting,
    prompts: Sequence[tuple[int, str]],
    size: int,
    terms: Sequence[tuple[Attribute, float]],
    judge: Scorer,
    labels: dict[str, str],
    judge_model: Base | None,
) -> list[_Written]:
    session, ways = setting.session, setting.generation
    sampling = Sampling(ways.max_new_tokens, ways.temperature, ways.top_p, seed=setting.seed)
    jobs = [TextRequest(prompt, index, sample) for index, prompt in prompts for sample in range(ways.num_samples)]
    with steered(session, terms):
        texts = list(
            generate_texts(
                session, jobs, sampling, batch_size=size, stage=setting.stage, total=len(jobs), report=setting.report
            )
        )
    if not texts:
        return []
    has = {name: [verdict.has for verdict in judge.judge(texts, label)] for name, label in labels.items()}
    with _without_peft(session.base.model):
        likelihoods = continuation_nll(session, [prompt for _, prompt in prompts], texts, size, judge_model)
    parts = [slice(start, start + ways.num_samples) for start in range(0, len(texts), ways.num_samples)]
    return [_Written(texts[p], {name: each[p] for name, each in has.items()}, likelihoods[p]) for p in parts]


@contextmanager
def _without_peft(model: Any) -> Iterator[None]:
    """An adapter of peft stays out of it, as one of ours does in `continuation_nll`."""
    layers = [each for each in model.modules() if hasattr(each, "enable_adapters") and hasattr(each, "base_layer")]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def _summary(prompts: Sequence[str], written: Sequence[_Written], asked: Sequence[str], size: int) -> Measured:
    count = len(prompts)
    results: dict[str, dict[str, Any]] = {}
    documents: dict[str, dict[int, float]] = {}
    for name in asked:
        groups = [[float(value) for value in each.has[name]] for each in written]
        means = [sum(group) / len(group) for group in groups]
        results[name] = {"value": sum(means) / count, "stderr": cluster_error(groups), "n": count}
        documents[name] = dict(enumerate(means))
    nats = [sum(likelihood.nll for likelihood in each.likelihoods) for each in written]
    tokens = [float(sum(likelihood.tokens for likelihood in each.likelihoods)) for each in written]
    rate = sum(nats) / sum(tokens) if sum(tokens) else math.nan
    perplexity = math.exp(rate) if rate < 700 else math.inf
    error = rate_error(nats, tokens)
    results["perplexity"] = {"value": perplexity, "stderr": error and perplexity * error, "n": count}
    texts = [each.texts for each in written]
    for width in (1, 2, 3):
        results[f"distinct_{width}"] = {"value": distinct(texts, width), "stderr": None, "n": count}
    repeated = repetition(text for group in texts for text in group)
    results["repetition"] = {"value": repeated, "stderr": None, "n": count}
    samples: dict[int, dict[str, Any]] = {
        index: {"prompt": prompt, "answer": each.texts[0] if len(each.texts) == 1 else each.texts}
        for index, (prompt, each) in enumerate(zip(prompts, written, strict=True))
    }
    # Perplexity gets no p-value: each system has its own number of tokens, which a paired test of ratios cannot use.
    return Measured(results, documents, {}, samples, size)
