"""Sweep: the same prompts continued at several strengths, and what that does to the attribute and to the language.

    attribute_score   share of continuations that have the attribute, by a scorer
    perplexity        of the continuations given their prompts, under the unsteered base (adapter off) or a judge model:
                      exp of the mean nats a token, over all texts
    distinct_n        see `scoring.diversity`
    repetition

Strengths share their random streams, so two points differ by the steering alone. `chosen` is the strength with the
highest score at bearable perplexity on the first half of the prompts (every other one), reported on the other half:
the maximum of noisy scores looks better than it is on the prompts that chose it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
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
from braces_cli.scoring.confidence_intervals import Z, rate_error, share_interval
from braces_cli.scoring.diversity import distinct, repetition
from braces_cli.scoring.likelihood import Likelihood, continuation_likelihoods, likelihoods
from braces_cli.scoring.scorer import Scorer, Verdict
from braces_cli.steering.chat_prompts import encode_answer, has_template
from braces_cli.steering.generate_texts import generate_texts, text_requests


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
    """

    strengths: Sequence[float]
    samples: int = 1
    batch_size: int = 32
    max_perplexity: float = 2.0
    layers: Collection[int] | None = None
    chat: bool = False
    processes: Processes = ALONE


@dataclass
class Texts:
    """Continuations at one strength, in the order of prompts and their samples."""

    s: float
    texts: list[str]
    verdicts: list[Verdict] = field(default_factory=list)
    likelihoods: list[Likelihood] = field(default_factory=list)


def sweep(
    session: Session,
    attribute: Attribute,
    prompts: Sequence[str],
    judge: Scorer,
    label: str,
    sampling: Sampling,
    plan: SweepPlan,
    *,
    others: Sequence[tuple[Attribute, float]] = (),
    judge_model: Base | None = None,
    report: Report = silent,
) -> dict[str, Any]:
    """Points of every strength, and the strength that half of the prompts choose.

    Args:
        label: the scorer's for the attribute.
        others: attributes that stay at their strength.
        judge_model: measures perplexity in place of the session's own base.

    Returns:
        `{points, chosen, unsteered}`; `unsteered` is the point at s = 0, measured whether asked for or not.

    Raises:
        BracesError: the scorer fails.
        ConfigError: no strength, or the continuations do not fit the model.
    """
    if not plan.strengths:
        raise ConfigError("no strength", where="--sweep", hint="Such as --sweep -4:4:1.")
    prompts = list(prompts)
    texts_at: dict[float, Texts] = {}
    wanted = [*plan.strengths, *([] if 0 in plan.strengths else [0.0])]
    for index, s in enumerate(wanted):
        stage = f"strength {index + 1} of {len(wanted)}: s = {s:g}"
        with steered(session, [(attribute, s), *others], plan.layers):
            texts = continuations(session, prompts, sampling, plan, report, stage)
        texts_at[s] = Texts(s, texts)
    for each in texts_at.values():
        each.verdicts = plan.processes.share_out(each.texts, lambda texts: judge.judge(texts, label))
        if len(each.verdicts) != len(each.texts):
            raise BracesError(f"{judge.name} scored {len(each.verdicts)} of {len(each.texts)} texts")
        each.likelihoods = continuation_nll(
            session, prompts, each.texts, plan.batch_size, judge_model, plan.chat, plan.processes
        )
    rows = [point(texts_at[s], prompts, range(len(prompts))) for s in plan.strengths]
    return {
        "points": rows,
        "chosen": _choose([texts_at[s] for s in plan.strengths], texts_at[0.0], prompts, plan.max_perplexity),
        "unsteered": point(texts_at[0.0], prompts, range(len(prompts))),
    }


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
    judge_model: Base | None = None,
    chat: bool = False,
    processes: Processes = ALONE,
) -> list[Likelihood]:
    """Negative log-likelihood of each text given its prompt, under the bare base or the judge.

    Args:
        texts: as many for each prompt, those of one prompt together.
        chat: the texts answer the prompts in a chat; a judge without a chat template reads them as plain text.
    """
    base = judge_model or session.base
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
        if session.adapter is not None and judge_model is None:
            stack.enter_context(session.adapter.disabled())
        return processes.share_out(pairs, measure)


def point(measured: Texts, prompts: Sequence[str], chosen: Collection[int]) -> dict[str, Any]:
    """The measures at one strength over the prompts `chosen`, by their indices."""
    samples = len(measured.texts) // len(prompts)
    rows = [range(index * samples, (index + 1) * samples) for index in chosen]
    groups = [[measured.texts[row] for row in group] for group in rows]
    has = [[measured.verdicts[row].has for row in group] for group in rows]
    nats = [sum(measured.likelihoods[row].nll for row in group) for group in rows]
    tokens = [float(sum(measured.likelihoods[row].tokens for row in group)) for group in rows]
    count = sum(map(len, has))
    rate = sum(nats) / sum(tokens) if sum(tokens) else math.nan
    error = rate_error(nats, tokens)
    return {
        "s": measured.s,
        "attribute_score": sum(map(sum, has)) / count,
        "attribute_score_interval": list(share_interval(has)),
        "mean_value": sum(measured.verdicts[row].value for group in rows for row in group) / count,
        "perplexity": _exp(rate),
        "perplexity_interval": None if error is None else [_exp(rate - Z * error), _exp(rate + Z * error)],
        **{f"distinct_{width}": distinct(groups, width) for width in (1, 2, 3)},
        "repetition": repetition(text for group in groups for text in group),
        "n": count,
    }


def _exp(rate: float) -> float:
    return math.exp(rate) if rate < 700 else math.inf


def _choose(
    all_: Sequence[Texts], unsteered: Texts, prompts: Sequence[str], max_perplexity: float
) -> dict[str, Any] | None:
    """The strength that half of the prompts choose, measured on the other half; None for a single prompt."""
    if len(prompts) < 2:
        return None
    first, second = range(0, len(prompts), 2), range(1, len(prompts), 2)
    limit = max_perplexity * point(unsteered, prompts, first)["perplexity"]
    points = [(point(each, prompts, first), each) for each in all_]
    bearable = [(row, each) for row, each in points if row["perplexity"] <= limit]
    if not bearable:
        return None
    # Of equal scores the weakest push.
    row, best = max(bearable, key=lambda pair: (pair[0]["attribute_score"], -abs(pair[0]["s"])))
    return {
        "s": best.s,
        "max_perplexity": max_perplexity,
        "on_choosing_half": row,
        "on_other_half": point(best, prompts, second),
        "unsteered_on_other_half": point(unsteered, prompts, second),
    }
