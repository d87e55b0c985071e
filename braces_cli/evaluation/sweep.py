"""Sweep: the same texts measured at several strengths, and what steering does to the attribute and to the language.

attribute_score   share of continuations with the attribute; other measures: see `evaluation.text_tasks`
effect, wrong_way, slope    see `evaluation.statistics`
chosen            strength with the highest score at an acceptable perplexity on every other prompt, measured on the
                  remaining prompts: the maximum of noisy scores is too high on the prompts that chose it
at_equal_perplexity         score of each method at a multiple of the unsteered perplexity. From s = 0 outwards, on
                  each side, the points of a method are joined by lines in log perplexity; the score is where such
                  a line first reaches the perplexity, else that of the outermost point
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import chain
from typing import Any

from braces_cli.evaluation.native_tasks import AnswerPair, log_odds, probability
from braces_cli.evaluation.statistics import Z, effect, mean, share, share_interval, slope, worst_of
from braces_cli.evaluation.text_tasks import RATINGS, Continuations, TextMeasurement
from braces_cli.scoring.likelihood import safe_exp

# Name of the swept method next to baselines.
BRACES_METHOD = "braces"
# Multiples of the unsteered perplexity: those that methods are compared at, and the largest of a chosen strength.
RATIOS = (1.25, 1.5, 2.0)
MAX_PERPLEXITY = 2.0


@dataclass(frozen=True)
class Method:
    """A way to steer.

    Attributes:
        steering: steers the open model at strength s while it is entered.
        inputs: what the model reads in place of the prompts at s; texts are scored after the prompts.
    """

    name: str
    strengths: Sequence[float]
    steering: Callable[[float], AbstractContextManager[Any]]
    inputs: Callable[[Sequence[str], float], Sequence[str]] = lambda prompts, s: prompts


@dataclass(frozen=True)
class _Measured:
    """Measurements at one strength: texts, and log odds of the positive answer of each row with two answers."""

    s: float
    texts: Continuations
    log_odds: list[float]


def sweep(
    measurement: TextMeasurement,
    prompts: Sequence[str],
    ours: Method,
    baselines: Sequence[Method] = (),
    answers: Sequence[AnswerPair] = (),
) -> dict[str, Any]:
    """Measure every strength, and choose the best one.

    Args:
        measurement: scores one attribute.
        baselines: other methods, measured on the same prompts.
        answers: rows with two answers; the preference is measured at each strength.

    Returns:
        `{points, chosen, unsteered, slope}`; `unsteered` is the point at s = 0, which is always measured. With
        `answers` also `answers`, a point for each strength, and `answer_slope`; with baselines `baselines`,
        `{method, points}` each, and `at_equal_perplexity`.
    """
    session, processes = measurement.session, measurement.processes

    def preferred(pairs: Sequence[AnswerPair]) -> list[float]:
        return log_odds(session, pairs, measurement.batch_size, measurement.chat)

    def measured(method: Method, strengths: Sequence[float]) -> list[_Measured]:
        out = []
        for number, s in enumerate(strengths, 1):
            stage = f"{method.name}, strength {number} of {len(strengths)}: s = {s:g}"
            texts = measurement.measure(prompts, method.steering(s), stage, method.inputs(prompts, s))
            with method.steering(s):
                odds = processes.share_out(answers if method is ours else (), preferred)
            out.append(_Measured(s, texts, odds))
        return out

    found = measured(ours, [*ours.strengths, *([] if 0 in ours.strengths else [0.0])])
    unsteered = next(each for each in found if each.s == 0)
    requested, strengths = found[: len(ours.strengths)], [each.s for each in found]
    document: dict[str, Any] = {
        "points": [_point(each, unsteered) for each in requested],
        "chosen": _choose(requested, unsteered),
        "unsteered": _point(unsteered, unsteered),
        "slope": slope(strengths, [_prompt_values(each.texts) for each in found]),
    }
    if answers:
        document["answer_slope"] = slope(strengths, [each.log_odds for each in found])
        document["answers"] = [_answer_point(each, unsteered) for each in requested]
    if baselines:
        document["baselines"] = [
            {"method": each.name, "points": [_point(one, unsteered) for one in measured(each, each.strengths)]}
            for each in baselines
        ]
        document["at_equal_perplexity"] = at_equal_perplexity(document)
    return document


def _prompt_values(texts: Continuations) -> list[float]:
    """Return the scorer's value of each prompt, the mean over its samples."""
    (attribute,) = texts.scores
    return [sum(group) / len(group) for group in texts.values(attribute)]


def _point(measured: _Measured, unsteered: _Measured, half: slice = slice(None)) -> dict[str, Any]:
    """Return the measures at one strength, over all prompts or half of them."""
    texts = measured.texts.of_prompts(half)
    (attribute,) = texts.scores
    has, values = texts.has(attribute), texts.values(attribute)
    count = sum(map(len, has))
    rate, error = texts.rate()
    ratings = list(chain.from_iterable(texts.ratings))
    return {
        "s": measured.s,
        "attribute_score": sum(map(sum, has)) / count,
        "attribute_score_interval": list(share_interval(has)),
        "mean_value": sum(map(sum, values)) / count,
        "perplexity": safe_exp(rate),
        "perplexity_interval": None if error is None else [safe_exp(rate - Z * error), safe_exp(rate + Z * error)],
        **texts.diversity(),
        "n": count,
        **effect(measured.s, _prompt_values(texts), _prompt_values(unsteered.texts.of_prompts(half))),
        **worst_of(values, has),
        **{name: sum(getattr(each, name) for each in ratings) / len(ratings) for name in RATINGS if ratings},
    }


def _answer_point(measured: _Measured, unsteered: _Measured) -> dict[str, Any]:
    """Return the preference between two answers; `shift` is that of the log odds of the positive answer."""
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


def _choose(requested: Sequence[_Measured], unsteered: _Measured) -> dict[str, Any] | None:
    """Return the best strength on one half of the prompts, measured on the other; None for one prompt."""
    if len(unsteered.texts.prompts) < 2:
        return None
    first, second = slice(0, None, 2), slice(1, None, 2)
    limit = MAX_PERPLEXITY * _point(unsteered, unsteered, first)["perplexity"]
    points = [(_point(each, unsteered, first), each) for each in requested]
    acceptable = [(row, each) for row, each in points if row["perplexity"] <= limit]
    if not acceptable:
        return None
    # Of equal scores the weakest steering.
    row, best = max(acceptable, key=lambda pair: (pair[0]["attribute_score"], -abs(pair[0]["s"])))
    return {
        "s": best.s,
        "max_perplexity": MAX_PERPLEXITY,
        "on_choosing_half": row,
        "on_other_half": _point(best, unsteered, second),
        "unsteered_on_other_half": _point(unsteered, unsteered, second),
    }


def at_equal_perplexity(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Return rows `{method, side, ratio, attribute_score, s, reached}` of a sweep with baselines.

    `side` is the sign of s; `reached` is whether the method has points of that perplexity. A method without points on
    a side has no row there.
    """
    unsteered = document["unsteered"]
    return [
        {"method": name, "side": side, "ratio": ratio, **row}
        for ratio in RATIOS
        for side in (1, -1)
        for name, points in methods(document)
        if (row := _score_at(unsteered, points, side, ratio * unsteered["perplexity"])) is not None
    ]


def methods(document: dict[str, Any]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Return each method of a sweep with baselines, and its points."""
    return [(BRACES_METHOD, document["points"]), *((each["method"], each["points"]) for each in document["baselines"])]


def _score_at(
    unsteered: dict[str, Any], points: Sequence[dict[str, Any]], side: int, perplexity: float
) -> dict[str, Any] | None:
    outwards = sorted((each for each in points if each["s"] * side > 0), key=lambda each: abs(each["s"]))
    if not outwards:
        return None
    last = {**unsteered, "s": 0.0}
    for each in outwards:
        if each["perplexity"] > perplexity:
            low, high = math.log(last["perplexity"]), math.log(each["perplexity"])
            way = (math.log(perplexity) - low) / (high - low)
            score, s = (last[key] + way * (each[key] - last[key]) for key in ("attribute_score", "s"))
            return {"attribute_score": score, "s": s, "reached": True}
        last = each
    return {"attribute_score": last["attribute_score"], "s": last["s"], "reached": False}
