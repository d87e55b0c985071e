"""The measures of a sweep at one strength, over all prompts or some of them."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from braces_cli.scoring.confidence_intervals import Z, rate_error, share_interval
from braces_cli.scoring.diversity import distinct, repetition
from braces_cli.scoring.judge_model import Rating
from braces_cli.scoring.likelihood import Likelihood
from braces_cli.scoring.prompt_effects import effect, mean, share, slope, worst_of
from braces_cli.scoring.scorer import TextScore
from braces_cli.steering.answer_preference import probability


@dataclass
class Texts:
    """Continuations at one strength, in the order of prompts and their samples.

    Attributes:
        ratings: of a judge model, none of other scorers.
        log_odds: of the positive answer of each row with two answers.
    """

    s: float
    texts: list[str]
    text_scores: list[TextScore] = field(default_factory=list)
    likelihoods: list[Likelihood] = field(default_factory=list)
    ratings: list[Rating] = field(default_factory=list)
    log_odds: list[float] = field(default_factory=list)


def point(
    measured: Texts, prompts: Sequence[str], chosen: Collection[int], unsteered: Texts | None = None
) -> dict[str, Any]:
    """The measures at one strength over the prompts `chosen`, by their indices.

    Args:
        unsteered: the same at s = 0, for the effect on each prompt.
    """
    rows = _rows(measured, prompts, chosen)
    groups = [[measured.texts[row] for row in group] for group in rows]
    has = [[measured.text_scores[row].has for row in group] for group in rows]
    values = [[measured.text_scores[row].value for row in group] for group in rows]
    nats = [sum(measured.likelihoods[row].nll for row in group) for group in rows]
    tokens = [float(sum(measured.likelihoods[row].tokens for row in group)) for group in rows]
    count = sum(map(len, has))
    rate = sum(nats) / sum(tokens) if sum(tokens) else math.nan
    error = rate_error(nats, tokens)
    return {
        "s": measured.s,
        "attribute_score": sum(map(sum, has)) / count,
        "attribute_score_interval": list(share_interval(has)),
        "mean_value": sum(map(sum, values)) / count,
        "perplexity": _exp(rate),
        "perplexity_interval": None if error is None else [_exp(rate - Z * error), _exp(rate + Z * error)],
        **{f"distinct_{width}": distinct(groups, width) for width in (1, 2, 3)},
        "repetition": repetition(text for group in groups for text in group),
        "n": count,
        **({} if unsteered is None else effect(measured.s, _means(values), prompt_values(unsteered, prompts, chosen))),
        **worst_of(values, has),
        **_rating(measured, [row for group in rows for row in group]),
    }


def prompt_values(measured: Texts, prompts: Sequence[str], chosen: Collection[int]) -> list[float]:
    """The scorer's value of each prompt, mean over its samples."""
    return _means([[measured.text_scores[row].value for row in group] for group in _rows(measured, prompts, chosen)])


def answer_point(measured: Texts, unsteered: Texts) -> dict[str, Any]:
    """How the preference between two answers shifts: `shift` is that of the log odds of the positive answer."""
    moved = effect(measured.s, measured.log_odds, unsteered.log_odds)
    return {
        "s": measured.s,
        **mean("probability", [probability(odds) for odds in measured.log_odds]),
        **share("prefers_positive", [odds > 0 for odds in measured.log_odds]),
        "shift": moved.pop("effect"),
        "shift_interval": moved.pop("effect_interval"),
        **moved,
        "n": len(measured.log_odds),
    }


def slopes(texts: Sequence[Texts], prompts: Sequence[str]) -> dict[str, Any]:
    """Slope over s of each prompt's value, and of the log odds where there are rows with two answers."""
    strengths = [each.s for each in texts]
    every = range(len(prompts))
    values = slope(strengths, [prompt_values(each, prompts, every) for each in texts])
    answers = slope(strengths, [each.log_odds for each in texts]) if texts[0].log_odds else None
    return {"slope": values, **({} if answers is None else {"answer_slope": answers})}


def _rows(measured: Texts, prompts: Sequence[str], chosen: Collection[int]) -> list[range]:
    samples = len(measured.texts) // len(prompts)
    return [range(index * samples, (index + 1) * samples) for index in chosen]


def _means(groups: Sequence[Sequence[float]]) -> list[float]:
    return [sum(group) / len(group) for group in groups]


def _rating(measured: Texts, rows: Sequence[int]) -> dict[str, float]:
    """Means of a judge model's ratings."""
    ratings = [measured.ratings[row] for row in rows] if measured.ratings else []
    names = ("concept", "relevance", "fluency", "overall") if ratings else ()
    return {name: sum(getattr(each, name) for each in ratings) / len(ratings) for name in names}


def _exp(rate: float) -> float:
    return math.exp(rate) if rate < 700 else math.inf
