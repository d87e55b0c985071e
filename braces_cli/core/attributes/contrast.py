"""Pairs of texts that differ in one attribute -> hidden states of each side -> the direction from one to the other.

    positive, negative (layers, n, d)    states of each pair's passages, pooled over the tokens of their texts
    direction (layers, d)                from the middle of the two sides to the positive one, by one of REDUCTIONS

Whatever the reduction, a direction is as long as half the difference of the two means, so that it means the same:
adding it to the middle gives the positive side, taking it off the negative one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from braces_cli.core.attributes.pooling import Row, Watch, input_watches, output_watches, pooled_batches
from braces_cli.core.attributes.word_lists import REDUCTIONS
from braces_cli.core.models.chat_turns import encode_answer
from braces_cli.core.models.tokenization import IGNORED, context_length, encode
from braces_cli.core.session import Session
from braces_cli.core.utils.errors import ConfigError, DataError
from braces_cli.core.utils.progress import Report, silent

# Where states are taken: what enters each FFN, or what its decoder layer gives to the next one.
CAPTURED = ("input", "output")


@dataclass(frozen=True)
class Passage:
    """A text whose tokens are pooled over, behind a prompt that is only read.

    Attributes:
        chat: the prompt is a user's turn in a chat, and the text the answer.
    """

    text: str
    prompt: str = ""
    chat: bool = False


@dataclass(frozen=True)
class Pair:
    """Two passages that differ in one attribute."""

    positive: Passage
    negative: Passage


@dataclass(frozen=True)
class PairStates:
    """Pooled states of n pairs, (layers, n, d) each, in float32 on the CPU."""

    positive: Tensor
    negative: Tensor

    @property
    def middle(self) -> Tensor:
        """Mean over both sides of all pairs, (layers, d)."""
        return (self.positive.mean(dim=1) + self.negative.mean(dim=1)) / 2

    def of(self, pairs: Sequence[int]) -> PairStates:
        """The states of some pairs, by index."""
        chosen = list(pairs)
        return PairStates(self.positive[:, chosen], self.negative[:, chosen])


def pair_states(
    session: Session,
    pairs: Sequence[Pair],
    *,
    captured: str = "input",
    pooling: str = "mean",
    report: Report = silent,
) -> PairStates:
    """Run the bare base over both passages of every pair; an adapter that is attached stays out of it.

    Args:
        captured: tensor of the FFN to read, one of CAPTURED.
        pooling: over the tokens of each text, one of `core.attributes.pooling.POOLINGS`.

    Raises:
        DataError: no pair, or the chat template refuses a prompt.
    """
    if not pairs:
        raise DataError("no pairs", where="--pairs", hint="Give at least one row of `positive` and `negative`.")
    model = session.base.model
    watches: list[Watch] = input_watches(session.ffns) if captured == "input" else output_watches(model, session.ffns)
    rows = [passage_tokens(session, side) for pair in pairs for side in (pair.positive, pair.negative)]
    states = torch.zeros(len(watches), len(rows), session.ffns[0].hidden_size)
    with ExitStack() as stack:
        if session.adapter is not None:
            stack.enter_context(session.adapter.disabled())
        for indices, pooled in pooled_batches(model, watches, rows, pooling, report, "reading pairs"):
            states[:, indices] = pooled
    return PairStates(states[:, 0::2], states[:, 1::2])


def passage_tokens(session: Session, passage: Passage) -> Row:
    """Tokens of a passage and where its text begins; what does not fit the model is cut from the front."""
    tokenizer = session.base.tokenizer
    max_length = context_length(session.base.model.config, tokenizer)
    if passage.chat:
        encoded = encode_answer(tokenizer, passage.prompt, passage.text)
    else:
        encoded = encode(tokenizer, passage.prompt, passage.text)
    start = sum(label == IGNORED for label in encoded.labels)
    special = set(tokenizer.all_special_ids)
    while start < len(encoded.ids) - 1 and encoded.ids[start] in special:
        start += 1
    # A text of no tokens of its own is pooled over the last token before it.
    start = min(start, len(encoded.ids) - 1)
    cut = max(len(encoded.ids) - max_length, 0)
    return encoded.ids[cut:], max(start - cut, 0)


def reduce_pairs(states: PairStates, reduction: str = "mean") -> Tensor:
    """Direction from the middle of the two sides to the positive one at each layer, (layers, d).

    Raises:
        ConfigError: no such reduction.
    """
    if reduction not in _REDUCTIONS:
        raise ConfigError(f"no reduction `{reduction}`", where="--reduction", hint=f"One of {', '.join(REDUCTIONS)}.")
    directions = []
    for positive, negative in zip(states.positive.double(), states.negative.double(), strict=True):
        mean = (positive - negative).mean(dim=0) / 2
        direction = _REDUCTIONS[reduction](positive, negative)
        directions.append(F.normalize(direction, dim=0) * mean.norm())
    return torch.stack(directions).float()


def _mean(positive: Tensor, negative: Tensor) -> Tensor:
    """Difference of means, (n, d), (n, d) -> (d,)."""
    return positive.mean(dim=0) - negative.mean(dim=0)


def _pca(positive: Tensor, negative: Tensor) -> Tensor:
    """First principal component of both sides, each pair less its own middle, turned towards the positive side."""
    differences = positive - negative
    # Less their middles the sides are plus and minus half the difference: the mean over both is 0 already.
    first = torch.linalg.svd(differences, full_matrices=False).Vh[0]
    return first if float((differences @ first).sum()) >= 0 else -first


def _logistic(positive: Tensor, negative: Tensor) -> Tensor:
    """Weights of a logistic regression that tells the sides apart, with an L2 penalty, each pair less its middle.

    The penalty is what a unit of each mean squared state costs, so that it does not depend on the scale of the states.
    """
    from sklearn.linear_model import LogisticRegression

    differences = (positive - negative) / 2
    rows = differences / differences.norm(dim=1).mean().clamp(min=1e-30)
    sides = torch.cat([rows, -rows]).numpy()
    labels = [1] * len(rows) + [0] * len(rows)
    # Its C is one over twice the penalty, for a sum of losses where the penalty here is for their mean.
    fitted = LogisticRegression(C=1 / (2 * _PENALTY * len(labels)), fit_intercept=False, max_iter=1000)
    return torch.from_numpy(fitted.fit(sides, labels).coef_[0])


_PENALTY = 1e-2

# One for each of REDUCTIONS: (n, d) states of both sides of n pairs -> a direction (d,) of any length.
_REDUCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mean": _mean, "pca": _pca, "logistic": _logistic}


def area(positive: Tensor, negative: Tensor) -> float:
    """AUROC of scores (n,) against (m,); ties count one half."""
    from sklearn.metrics import roc_auc_score

    labels = [1] * len(positive) + [0] * len(negative)
    return float(roc_auc_score(labels, torch.cat([positive, negative]).numpy()))


def separation(states: PairStates, reduction: str = "mean") -> list[dict[str, Any]]:
    """How well the direction of one half of the pairs separates the other half, at each layer, mean over both ways.

    `effect` is the mean difference of the two sides along the direction over its standard deviation among pairs;
    `auroc` the probability that a random positive passage lies further along it than a random negative one.
    """
    count = states.positive.shape[1]
    halves = (range(0, count, 2), range(1, count, 2))
    out: list[dict[str, Any]] = [{"effect": 0.0, "auroc": 0.0} for _ in range(len(states.positive))]
    for fitted, held_out in (halves, halves[::-1]):
        directions = reduce_pairs(states.of(fitted), reduction)
        other = states.of(held_out)
        for row, direction, positive, negative in zip(out, directions, other.positive, other.negative, strict=True):
            one, two = positive @ direction, negative @ direction
            gap = one - two
            row["effect"] += float(gap.mean() / gap.std(correction=0).clamp(min=1e-30)) / 2
            row["auroc"] += area(one, two) / 2
    return out
