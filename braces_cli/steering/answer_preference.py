"""Which of two answers a model prefers, as it is steered now: rows of contrastive evaluation sets (CAA).

    log odds      ln P(positive answer | prompt) - ln P(negative answer | prompt)
    probability   of the positive answer, where there are only these two: sigmoid of the log odds

Whole answers are scored, so of answers of different lengths the shift says something and the level little.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from braces_cli.core.models.chat_turns import encode_answer
from braces_cli.core.models.tokenization import Encoded, context_length, encode
from braces_cli.core.session import Session
from braces_cli.core.utils.errors import DataError
from braces_cli.data.readers import read_rows
from braces_cli.scoring.likelihood import likelihoods

# Names of the fields of a row, ours and those of the published sets.
_FIELDS = {
    "prompt": ("prompt", "question"),
    "positive": ("positive", "answer_matching_behavior"),
    "negative": ("negative", "answer_not_matching_behavior"),
}


@dataclass(frozen=True)
class AnswerPair:
    """A prompt and two answers to it, of which steering at s > 0 should make the positive one likelier."""

    prompt: str
    positive: str
    negative: str


def read_answer_pairs(name: str) -> list[AnswerPair]:
    """Rows with `prompt`, `positive` and `negative`, or named as in the published sets.

    Raises:
        DataError: as `read_rows`, or a row without two different answers.
    """
    pairs = []
    for row in read_rows(name):
        fields = {
            ours: next((row.fields[each] for each in names if isinstance(row.fields.get(each), str)), None)
            for ours, names in _FIELDS.items()
        }
        if not fields["positive"] or not fields["negative"] or fields["positive"] == fields["negative"]:
            hint = f"Such a row holds `prompt`, `positive` and `negative`; found: {', '.join(row.fields)}."
            raise DataError("no two different answers", where=row.where, hint=hint)
        pairs.append(AnswerPair(fields["prompt"] or "", fields["positive"], fields["negative"]))
    return pairs


def log_odds(session: Session, pairs: Sequence[AnswerPair], batch_size: int, chat: bool = False) -> list[float]:
    """Of the positive answer against the negative one, for each pair, as the open model is steered now.

    Args:
        chat: the prompt is a user's turn, and the answer the model's.
    """
    base = session.base
    window = context_length(base.model.config, base.tokenizer)
    examples = []
    for pair in pairs:
        for answer in (pair.positive, pair.negative):
            turn = (encode_answer if chat else encode)(base.tokenizer, pair.prompt, answer)
            examples.append(Encoded(turn.ids[-window:], turn.labels[-window:], False, False))
    nll = [each.nll for each in likelihoods(base.model, examples, base.tokenizer.pad_token_id, batch_size)]
    return [negative - positive for positive, negative in zip(nll[::2], nll[1::2], strict=True)]


def probability(odds: float) -> float:
    """Of the positive answer, from its log odds."""
    return 1 / (1 + math.exp(-odds)) if odds >= 0 else math.exp(odds) / (1 + math.exp(odds))
