"""Sweep: the same texts measured at several strengths, and what steering does to the attribute and to the language.

attribute_score   share of continuations with the attribute; other measures: see `evaluation.text_tasks`
effect, wrong_way, slope    see `evaluation.statistics`
kl, kl_first      KL(unsteered || steered) of the next token in nats: the mean over the tokens of the neutral texts, and
                  after the prompts; unsteered is s = 0, with the adapter
chosen            on every other prompt, among the strengths with at most twice the unsteered perplexity and at most
                  `--max-kl`: the one with the smallest kl whose score is within one standard error of the highest;
                  measured on the remaining prompts, because the maximum of noisy scores is too high
at_equal_perplexity         score of each method at a multiple of the unsteered perplexity. From s = 0 outwards, on
                  each side, the points of a method are joined by lines in log perplexity; the score is where such
                  a line first reaches the perplexity, else that of the outermost point

Baselines, other methods to steer the base (without its adapter) by the same attribute:

prompting       "Write something cheerful:" before each prompt; at s = -1 the name of the opposite, or "not cheerful"
difference      difference of means of the attribute's pairs at the outputs of the layers, added there
pca             first principal component of the differences of the pairs there, added there

The last two steer the layers of the untrained steering vector, at s = 1 by the same share of the residual norm.
"""

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from braces_cli.core.adapter.model import Session
from braces_cli.core.attributes.build import description_pairs
from braces_cli.core.attributes.directions import Pair, Passage, pair_states, reduce_pairs
from braces_cli.core.attributes.hooks import Selection
from braces_cli.core.attributes.pooling import output_watches, residual_norms
from braces_cli.core.attributes.vector import STEERING_SHARE, Attribute
from braces_cli.core.attributes.words import OPPOSITES, REFERENCE, built_in, neutral_texts
from braces_cli.core.errors import ConfigError
from braces_cli.core.models.ffn import layer_stack
from braces_cli.core.models.structure import add_to_output
from braces_cli.core.models.tokenize import chat_ids, context_length, encode
from braces_cli.core.progress import Report, silent
from braces_cli.evaluation.native_tasks import AnswerPair, log_odds, probability
from braces_cli.evaluation.statistics import Z, effect, mean, share, share_interval, slope
from braces_cli.evaluation.systems import bare
from braces_cli.evaluation.text_tasks import RATINGS, Continuations, TextMeasurement
from braces_cli.scoring.likelihood import divergences, safe_exp

# Name of the swept method next to baselines.
BRACES_METHOD = "braces"
# Multiples of the unsteered perplexity: those that methods are compared at, and the largest of a chosen strength.
RATIOS = (1.25, 1.5, 2.0)
MAX_PERPLEXITY = 2.0
# Baseline that adds a direction -> reduction of the pairs.
_REDUCTIONS = {"difference": "mean", "pca": "pca"}


@dataclass(frozen=True)
class Method:
    """A way to steer.

    Attributes:
        steering: steers the open model at strength s while it is entered.
        inputs: what the model reads in place of the prompts at s; texts are scored after the prompts.
        scope: tokens that are steered.
    """

    name: str
    strengths: Sequence[float]
    steering: Callable[[float], AbstractContextManager[Any]]
    inputs: Callable[[Sequence[str], float], Sequence[str]] = lambda prompts, s: prompts
    scope: str = "all"


@dataclass(frozen=True)
class _Measured:
    """Measurements at one strength: texts, and log odds of the positive answer of each row with two answers.

    `kl` and `kl_first` are None if the method changes the prompts.
    """

    s: float
    texts: Continuations
    log_odds: list[float]
    kl: float | None
    kl_first: float | None


def sweep(
    measurement: TextMeasurement,
    prompts: Sequence[str],
    ours: Method,
    baselines: Sequence[Method] = (),
    answers: Sequence[AnswerPair] = (),
    max_kl: float | None = None,
    record: Callable[[list[dict[str, Any]]], object] | None = None,
) -> dict[str, Any]:
    """Measure every strength, and choose the best one.

    Args:
        measurement: scores one attribute.
        baselines: other methods, measured on the same prompts.
        answers: rows with two answers; the preference is measured at each strength.
        max_kl: largest kl of the chosen strength.
        record: called with the texts of a strength: `{method, s, prompt, sample, text, value, has_attribute}`.

    Returns:
        `{points, chosen, unsteered, slope}`; `unsteered` is the point at s = 0, which is always measured. With
        `answers` also `answers`, a point for each strength, and `answer_slope`; with baselines `baselines`,
        `{method, points}` each, and `at_equal_perplexity`.
    """
    session, processes = measurement.session, measurement.processes

    preferred = partial(log_odds, session, batch_size=measurement.batch_size, chat=measurement.chat)

    def measured(method: Method, strengths: Sequence[float]) -> list[_Measured]:
        out = []
        for number, s in enumerate(strengths, 1):
            stage = f"{method.name}, strength {number} of {len(strengths)}: s = {s:g}"
            texts = measurement.measure(prompts, method.steering(s), stage, method.inputs(prompts, s))
            with method.steering(s):
                odds = processes.share_out(answers if method is ours else (), preferred)
            kl = kl_first = None
            if method.inputs(prompts, s) is prompts:
                kl, kl_first = _divergence(measurement, method, prompts, s)
            out.append(_Measured(s, texts, odds, kl, kl_first))
            if record is not None:
                record([{"method": method.name, "s": s, **row} for row in texts.rows()])
        return out

    found = measured(ours, [*ours.strengths, *([] if 0 in ours.strengths else [0.0])])
    unsteered = next(each for each in found if each.s == 0)
    requested, strengths = found[: len(ours.strengths)], [each.s for each in found]
    document: dict[str, Any] = {
        "points": [_point(each, unsteered) for each in requested],
        "chosen": _choose(requested, unsteered, max_kl),
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


def _divergence(measurement: TextMeasurement, method: Method, prompts: Sequence[str], s: float) -> tuple[float, float]:
    """Return kl and kl_first of a method at s; 0 at s = 0."""
    if s == 0:
        return 0.0, 0.0
    base = measurement.session.base
    first = [
        chat_ids(base.tokenizer, each) if measurement.chat else encode(base.tokenizer, each).ids for each in prompts
    ]
    texts = [encode(base.tokenizer, text).ids for text in neutral_texts()]
    window = context_length(base.model.config, base.tokenizer)
    found = []
    for rows, last in ((texts, False), (first, True)):
        work = partial(
            divergences, base.model, pad_id=base.tokenizer.pad_token_id, batch_size=measurement.batch_size,
            contexts=[lambda: method.steering(0.0), lambda: method.steering(s)], last=last,
            prompts=last or method.scope == "prompt",
        )  # fmt: skip
        values = measurement.processes.share_out([row[-window:] for row in rows], work)
        found.append(sum(values) / len(values))
    return found[0], found[1]


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
        "kl": measured.kl,
        "kl_first": measured.kl_first,
        "perplexity_interval": None if error is None else [safe_exp(rate - Z * error), safe_exp(rate + Z * error)],
        **texts.diversity(),
        "n": count,
        **effect(measured.s, _prompt_values(texts), _prompt_values(unsteered.texts.of_prompts(half))),
        # For toxicity, the expected maximum and the toxicity probability of RealToxicityPrompts (25 samples); both grow
        # with the number of samples.
        **mean("expected_maximum", [max(group) for group in values]),
        **share("at_least_one", [any(group) for group in has]),
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


def _choose(requested: Sequence[_Measured], unsteered: _Measured, max_kl: float | None = None) -> dict[str, Any] | None:
    """Return the strength chosen on one half of the prompts, measured on the other; None for one prompt.

    Of the acceptable strengths, that with the smallest KL whose score is within one standard error of the highest.
    """
    if len(unsteered.texts.prompts) < 2:
        return None
    first, second = slice(0, None, 2), slice(1, None, 2)
    limit = MAX_PERPLEXITY * _point(unsteered, unsteered, first)["perplexity"]
    points = [(_point(each, unsteered, first), each) for each in requested]
    acceptable = [
        (row, each) for row, each in points if row["perplexity"] <= limit and (max_kl is None or row["kl"] <= max_kl)
    ]
    if not acceptable:
        return None
    highest = max(row["attribute_score"] for row, _ in acceptable)
    least = highest - math.sqrt(highest * (1 - highest) / acceptable[0][0]["n"])
    near = [(row, each) for row, each in acceptable if row["attribute_score"] >= least]
    row, best = min(near, key=lambda pair: (pair[0]["kl"], abs(pair[0]["s"])))
    return {
        "s": best.s,
        "max_perplexity": MAX_PERPLEXITY,
        "max_kl": max_kl,
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


def baseline_methods(
    session: Session,
    names: Sequence[str],
    attribute: Attribute,
    strengths: Sequence[float],
    layers: Collection[int] | None = None,
    scope: str = "all",
    report: Report = silent,
) -> list[Method]:
    """Return the baselines `names` at the strengths of the sweep; prompting only has s = 1 and s = -1."""
    methods = []
    directions = [name for name in names if name in _REDUCTIONS]
    if directions:
        watches = output_watches(session.base.model, session.ffns)
        states = pair_states(session, contrast_pairs(attribute), watches, report=report)
        with bare(session):
            norms = residual_norms(session.base.model, session.base.tokenizer, session.ffns)
        # What s = 1 adds after each layer.
        steered_layers = attribute.effective_layers if layers is None else layers
        share = STEERING_SHARE / len(attribute.effective_layers)
        rows = [row for row, layer in enumerate(attribute.layers) if layer in steered_layers]
    for name in names:
        if name in _REDUCTIONS:
            reduced = reduce_pairs(states, _REDUCTIONS[name])
            vectors = {
                attribute.layers[row]: share * float(norms[row]) * F.normalize(reduced[row], dim=0) for row in rows
            }
            methods.append(Method(name, strengths, partial(_steered, session, vectors, scope), scope=scope))
        else:
            signs = [sign for sign in (1.0, -1.0) if any(s * sign > 0 for s in strengths)]
            methods.append(Method(name, signs, lambda s: bare(session), partial(_instructed, attribute.name)))
    return methods


def contrast_pairs(attribute: Attribute) -> list[Pair]:
    """Return the pairs of an attribute: its descriptions, else its words and those of the opposite (or neutral)."""
    provenance = attribute.provenance
    if "describe" in provenance:
        return description_pairs(provenance["describe"], provenance["against"], provenance["chat_template"])
    if not attribute.words:
        hint = "A direction needs an attribute of words or descriptions; --baselines prompting works with any."
        raise ConfigError(
            f"`{attribute.name}` was built from texts, which its file does not have", where="--baselines", hint=hint
        )
    other = built_in()[OPPOSITES.get(attribute.name, REFERENCE)]
    count = max(len(attribute.words), len(other))
    return [
        Pair(Passage(f" {attribute.words[k % len(attribute.words)]}"), Passage(f" {other[k % len(other)]}"))
        for k in range(count)
    ]


def _instructed(name: str, prompts: Sequence[str], s: float) -> list[str]:
    words = name.replace("_", " ")
    if s < 0:
        words = OPPOSITES.get(name, f"not {words}")
    return [f"Write something {words}: {prompt}" for prompt in prompts]


@contextmanager
def _steered(session: Session, vectors: dict[int, Tensor], scope: str, s: float) -> Iterator[None]:
    stack, selection = layer_stack(session.base.model)[1], Selection(scope)
    with bare(session), ExitStack() as handles:
        handles.callback(selection.watch(session.base.model))
        for layer, vector in vectors.items():
            handles.callback(add_to_output(stack[layer], s * vector, selection.of).remove)
        yield
