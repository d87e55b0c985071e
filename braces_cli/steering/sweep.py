"""Sweep: the same prompts continued at several strengths, and what that does to the attribute and to the language.

    attribute_score   share of continuations that have the attribute, by a scorer
    perplexity        of the continuations given their prompts, under the unsteered base (adapter off) or a judge model:
                      exp of the mean nats a token, over all texts
    distinct_n        see `scoring.diversity`
    repetition
    effect, wrong_way, slope                see `scoring.prompt_effects`
    expected_maximum, at_least_one          the same, of the samples of a prompt

Strengths share their random streams, so two points differ by the steering alone. `chosen` is the strength with the
highest score at bearable perplexity on the first half of the prompts (every other one), reported on the other half:
the maximum of noisy scores looks better than it is on the prompts that chose it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

from braces_cli.core.attributes.attribute import Attribute
from braces_cli.core.attributes.intervention import steered
from braces_cli.core.models.generation import Sampling
from braces_cli.core.models.loading import Base
from braces_cli.core.models.tokenization import Encoded, context_length
from braces_cli.core.session import Session
from braces_cli.core.utils.distributed import ALONE, Processes
from braces_cli.core.utils.errors import BracesError, ConfigError
from braces_cli.core.utils.progress import Report, silent
from braces_cli.scoring.judge_model import Rater, text_score
from braces_cli.scoring.likelihood import Likelihood, continuation_likelihoods, likelihoods
from braces_cli.scoring.scorer import Scorer
from braces_cli.steering.answer_preference import AnswerPair, log_odds
from braces_cli.steering.chat_prompts import encode_answer, has_template
from braces_cli.steering.equal_perplexity import at_equal_perplexity
from braces_cli.steering.generate_texts import generate_texts, text_requests
from braces_cli.steering.sweep_points import Texts, answer_point, point, slopes


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
