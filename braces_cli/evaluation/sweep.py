"""Ways to steer side by side at equal perplexity: how far each moves the score before the language costs so much.

From s = 0 outwards, on each side of it, a method's points are joined by lines in the logarithm of the perplexity. The
score at a perplexity is where such a line first reaches it; a method that never costs so much has the score of its
outermost point.

The measures of a sweep at one strength, over all prompts or some of them.

Sweep: the same prompts continued at several strengths, and what that does to the attribute and to the language.

    attribute_score   share of continuations that have the attribute, by a scorer
    perplexity        of the continuations given their prompts, under the unsteered base (adapter off) or a judge model:
                      exp of the mean nats a token, over all texts
    distinct_n        see `scoring.scorers`
    repetition
    effect, wrong_way, slope                see `evaluation.statistics`
    expected_maximum, at_least_one          the same, of the samples of a prompt

Strengths share their random streams, so two points differ by the steering alone. `chosen` is the strength with the
highest score at bearable perplexity on the first half of the prompts (every other one), reported on the other half:
the maximum of noisy scores looks better than it is on the prompts that chose it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import Any

from braces_cli.core.adapter.model import Session
from braces_cli.core.attributes.hooks import steered
from braces_cli.core.attributes.vector import Attribute
from braces_cli.core.distributed import ALONE, Processes
from braces_cli.core.errors import BracesError, ConfigError
from braces_cli.core.models.load import Base
from braces_cli.core.models.tokenize import Encoded, context_length
from braces_cli.core.options import Sampling
from braces_cli.core.progress import Report, silent
from braces_cli.evaluation.native_tasks import AnswerPair, log_odds, probability
from braces_cli.evaluation.statistics import Z, effect, mean, rate_error, share, share_interval, slope, worst_of
from braces_cli.scoring.likelihood import Likelihood, continuation_likelihoods, likelihoods
from braces_cli.scoring.model_scorers import Rater, Rating, text_score
from braces_cli.scoring.scorers import Scorer, TextScore, distinct, repetition
from braces_cli.steering.texts import encode_answer, generate_texts, has_template, text_requests

# Of the unsteered perplexity.
RATIOS = (1.25, 1.5, 2.0)
BRACES_METHOD = "braces"


def at_equal_perplexity(swept: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows `{method, side, ratio, attribute_score, s, reached}` of a sweep with baselines.

    `side` is the sign of s; `reached` says whether the method has points of that perplexity. What has no point on a
    side has no row there.
    """
    unsteered = swept["unsteered"]
    methods = [(BRACES_METHOD, swept["points"]), *((each["method"], each["points"]) for each in swept["baselines"])]
    return [
        {"method": name, "side": side, "ratio": ratio, **row}
        for ratio in RATIOS
        for side in (1, -1)
        for name, points in methods
        if (row := _score(unsteered, points, side, ratio * unsteered["perplexity"])) is not None
    ]


def _score(
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


@dataclass(frozen=True)
class Method:
    """A way to steer, measured at strengths of its own.

    Attributes:
        steering: steers the open model at s while it is entered.
        read: what the model reads in place of the prompts at s; the texts are measured behind the prompts themselves.
    """

    name: str
    strengths: Sequence[float]
    steering: Callable[[float], AbstractContextManager[Any]]
    read: Callable[[Sequence[str], float], Sequence[str]] = lambda prompts, s: prompts


@dataclass(frozen=True)
class SweepPlan:
    """What to sweep.

    Attributes:
        strengths: in the order of the points.
        samples: texts for each prompt and strength.
        batch_size: texts at a time.
        max_perplexity: of the chosen strength at most, as a multiple of the unsteered one.
        layers: decoder layers that are steered; None means all that can be.
        chat: prompts go through the chat template.
        processes: share out generating and scoring.
        answers: rows with two answers, between which the preference is measured at each strength.
        baselines: other ways to steer, measured on the same prompts.
    """

    strengths: Sequence[float]
    samples: int = 1
    batch_size: int = 32
    max_perplexity: float = 2.0
    layers: Collection[int] | None = None
    chat: bool = False
    processes: Processes = ALONE
    answers: Sequence[AnswerPair] = ()
    baselines: Sequence[Method] = ()


def sweep(
    session: Session,
    attribute: Attribute,
    prompts: Sequence[str],
    scorer: Scorer,
    label: str,
    sampling: Sampling,
    plan: SweepPlan,
    *,
    others: Sequence[tuple[Attribute, float]] = (),
    reference_model: Base | None = None,
    report: Report = silent,
) -> dict[str, Any]:
    """Points of every strength, and the strength that half of the prompts choose.

    Args:
        label: the scorer's for the attribute.
        others: attributes that stay at their strength.
        reference_model: measures perplexity in place of the session's own base.

    Returns:
        `{points, chosen, unsteered, slope}`; `unsteered` is the point at s = 0, measured whether asked for or not. With
        rows of two answers also `answers`, a point at each strength, and `answer_slope`; with baselines `baselines`,
        `{method, points}` each, and `at_equal_perplexity`.

    Raises:
        BracesError: the scorer fails.
        ConfigError: no strength, or the continuations do not fit the model.
    """
    if not plan.strengths:
        raise ConfigError("no strength", where="--sweep", hint="Such as --sweep -4:4:1.")
    prompts = list(prompts)
    requested = [*plan.strengths, *([] if 0 in plan.strengths else [0.0])]
    ours = Method("braces", requested, lambda s: steered(session, [(attribute, s), *others], plan.layers))

    def measured(method: Method) -> list[Texts]:
        texts = _generated(session, method, prompts, sampling, plan, report)
        for each in texts:
            score(session, each, prompts, scorer, label, plan, reference_model)
        return texts

    texts = measured(ours)
    unsteered, every = next(each for each in texts if each.s == 0), range(len(prompts))
    asked = texts[: len(plan.strengths)]

    def points(of: Sequence[Texts]) -> list[dict[str, Any]]:
        return [point(each, prompts, every, unsteered) for each in of]

    found: dict[str, Any] = {
        "points": points(asked),
        "chosen": _choose(asked, unsteered, prompts, plan.max_perplexity),
        "unsteered": points([unsteered])[0],
        **slopes(texts, prompts),
    }
    if plan.answers:
        found["answers"] = [answer_point(each, unsteered) for each in asked]
    if plan.baselines:
        found["baselines"] = [{"method": each.name, "points": points(measured(each))} for each in plan.baselines]
        found["at_equal_perplexity"] = at_equal_perplexity(found)
    return found


def _generated(
    session: Session, method: Method, prompts: Sequence[str], sampling: Sampling, plan: SweepPlan, report: Report
) -> list[Texts]:
    """Continuations by a method at each of its strengths, and the preference between two answers there."""
    out = []
    for index, s in enumerate(method.strengths):
        stage = f"{method.name}, strength {index + 1} of {len(method.strengths)}: s = {s:g}"
        with method.steering(s):
            texts = continuations(session, method.read(prompts, s), sampling, plan, report, stage)
            odds = plan.processes.share_out(
                plan.answers, lambda pairs: log_odds(session, pairs, plan.batch_size, plan.chat)
            )
        out.append(Texts(s, texts, log_odds=odds))
    return out


def score(
    session: Session,
    measured: Texts,
    prompts: Sequence[str],
    scorer: Scorer,
    label: str,
    plan: SweepPlan,
    reference_model: Base | None = None,
) -> None:
    """Add what the scorer says of the texts, and their likelihoods given their prompts.

    Raises:
        BracesError: the scorer fails.
    """
    if isinstance(scorer, Rater):
        asked = [prompt for prompt in prompts for _ in range(len(measured.texts) // len(prompts))]
        measured.ratings = plan.processes.share_out(
            list(zip(asked, measured.texts, strict=True)),
            lambda pairs: scorer.rate([prompt for prompt, _ in pairs], [text for _, text in pairs], label),
        )
        measured.text_scores = [text_score(rating.concept) for rating in measured.ratings]
    else:
        measured.text_scores = plan.processes.share_out(measured.texts, lambda texts: scorer.score(texts, label))
    if len(measured.text_scores) != len(measured.texts):
        raise BracesError(f"{scorer.name} scored {len(measured.text_scores)} of {len(measured.texts)} texts")
    measured.likelihoods = continuation_nll(
        session, prompts, measured.texts, plan.batch_size, reference_model, plan.chat, plan.processes
    )


def continuations(
    session: Session,
    prompts: Sequence[str],
    sampling: Sampling,
    plan: SweepPlan,
    report: Report = silent,
    stage: str = "generating",
) -> list[str]:
    """Texts of every prompt, its samples together, as the session is steered now."""
    texts = generate_texts(
        session, text_requests(prompts, plan.samples), sampling, batch_size=plan.batch_size, chat=plan.chat,
        stage=stage, total=len(prompts) * plan.samples, report=report, processes=plan.processes,
    )  # fmt: skip
    return list(texts)


def continuation_nll(
    session: Session,
    prompts: Sequence[str],
    texts: Sequence[str],
    batch_size: int,
    reference_model: Base | None = None,
    chat: bool = False,
    processes: Processes = ALONE,
) -> list[Likelihood]:
    """Negative log-likelihood of each text given its prompt, under the bare base or the judge.

    Args:
        texts: as many for each prompt, those of one prompt together.
        chat: the texts answer the prompts in a chat; a judge without a chat template reads them as plain text.
    """
    base = reference_model or session.base
    samples = len(texts) // len(prompts)
    pairs = [(prompts[index // samples], text) for index, text in enumerate(texts)]
    window = context_length(base.model.config, base.tokenizer)

    def measure(pairs: Sequence[tuple[str, str]]) -> list[Likelihood]:
        if not (chat and has_template(base.tokenizer)):
            return continuation_likelihoods(base.model, base.tokenizer, pairs, window, batch_size)
        examples = [encode_answer(base.tokenizer, prompt, text) for prompt, text in pairs]
        examples = [Encoded(each.ids[-window:], each.labels[-window:], False, False) for each in examples]
        return likelihoods(base.model, examples, base.tokenizer.pad_token_id, batch_size)

    with ExitStack() as stack:
        if session.adapter is not None and reference_model is None:
            stack.enter_context(session.adapter.disabled())
        return processes.share_out(pairs, measure)


def _choose(
    all_: Sequence[Texts], unsteered: Texts, prompts: Sequence[str], max_perplexity: float
) -> dict[str, Any] | None:
    """The strength that half of the prompts choose, measured on the other half; None for a single prompt."""
    if len(prompts) < 2:
        return None
    first, second = range(0, len(prompts), 2), range(1, len(prompts), 2)
    limit = max_perplexity * point(unsteered, prompts, first)["perplexity"]
    points = [(point(each, prompts, first, unsteered), each) for each in all_]
    bearable = [(row, each) for row, each in points if row["perplexity"] <= limit]
    if not bearable:
        return None
    # Of equal scores the weakest steering.
    row, best = max(bearable, key=lambda pair: (pair[0]["attribute_score"], -abs(pair[0]["s"])))
    return {
        "s": best.s,
        "max_perplexity": max_perplexity,
        "on_choosing_half": row,
        "on_other_half": point(best, prompts, second, unsteered),
        "unsteered_on_other_half": point(unsteered, prompts, second, unsteered),
    }
