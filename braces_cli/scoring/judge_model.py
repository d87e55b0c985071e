"""A language model as the judge of texts: concept, relevance and fluency, each from 0 to 2, as AxBench has them.

The judge is asked for a number, and what counts is not what it would write but the probabilities of the three possible
answers: a rating is 0 P(0) + 1 P(1) + 2 P(2), the probabilities of the three adding up to 1. Any causal language model
will do that follows instructions; one that was only trained to continue texts gives numbers that mean little.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch

from braces_cli.core.models.chat_turns import encode_answer, has_template
from braces_cli.core.models.load_options import LoadOptions
from braces_cli.core.models.loading import Base, input_device, load_base
from braces_cli.core.models.padding import by_length, pad_right
from braces_cli.core.models.tokenization import Encoded, common_length, context_length, encode
from braces_cli.scoring.scorer import TextScore, checked

JUDGE = "judge:"
_BATCH = 8
_RATINGS = ("0", "1", "2")
# From here on a text counts as having the concept.
_HAS = 1.0
_QUESTIONS = {
    "concept": "How much is this text {label}? 0: not at all, 1: somewhat, 2: clearly.",
    "relevance": "How well does this text go with the prompt before it? 0: not at all, 1: partly, 2: well.",
    "fluency": "How fluent is the language of this text? 0: not fluent, 1: somewhat fluent, 2: fluent.",
}
# The text comes first: what does not fit the judge is cut from the front, and the question must stay.
_PLAIN = "{prompt}Text: {text}\n\nQuestion: {question} Answer with the number only.\nAnswer:"


@dataclass(frozen=True)
class Rating:
    """Of one text, each from 0 to 2."""

    concept: float
    relevance: float
    fluency: float

    @property
    def overall(self) -> float:
        """Harmonic mean of the three: 0 where one of them is."""
        parts = (self.concept, self.relevance, self.fluency)
        return 3 / sum(1 / part for part in parts) if min(parts) > 0 else 0.0


@runtime_checkable
class Rater(Protocol):
    """A scorer that also rates how a text goes with its prompt, and its language."""

    def rate(self, prompts: Sequence[str], texts: Sequence[str], label: str) -> list[Rating]:
        """A rating of each text, given the prompt that it continues."""
        ...


class JudgeModel:
    """Ratings by a causal language model. It has no labels of its own: any label is asked about by its name."""

    labels: tuple[str, ...] = ()

    def __init__(self, name: str, base: Base) -> None:
        self.name = name
        self._base = base
        self._window = context_length(base.model.config, base.tokenizer)

    def score(self, texts: Sequence[str], label: str) -> list[TextScore]:
        values = self._ratings("concept", [""] * len(texts), texts, label)
        return [text_score(value) for value in values]

    def rate(self, prompts: Sequence[str], texts: Sequence[str], label: str) -> list[Rating]:
        parts = [self._ratings(question, prompts, texts, label) for question in _QUESTIONS]
        return [Rating(*values) for values in zip(*parts, strict=True)]

    def _ratings(self, question: str, prompts: Sequence[str], texts: Sequence[str], label: str) -> Sequence[float]:
        asked = _QUESTIONS[question].format(label=label.replace("_", " "))
        questions = [
            self._encode(_PLAIN.format(prompt=f"Prompt: {prompt}\n\n" if prompt else "", text=text, question=asked))
            for prompt, text in zip(prompts, texts, strict=True)
        ]
        values = [0.0] * len(questions)
        examples = [example for example, _ in questions]
        for rows in by_length(examples, _BATCH):
            chances = self._chances([examples[row] for row in rows], [questions[row][1] for row in rows])
            for row, chance in zip(rows, chances, strict=True):
                values[row] = sum(rating * float(p) for rating, p in enumerate(chance))
        return checked(self.name, values)

    def _encode(self, question: str) -> tuple[Encoded, list[int]]:
        """The question up to where the three answers part, and the token of each there."""
        tokenizer = self._base.tokenizer
        if has_template(tokenizer):
            answers = [encode_answer(tokenizer, question, rating).ids for rating in _RATINGS]
        else:
            answers = [encode(tokenizer, question, f" {rating}").ids for rating in _RATINGS]
        shared = min(common_length(answers[0], other) for other in answers[1:])
        ids = answers[0][:shared][-self._window :]
        return Encoded(ids, ids, False, False), [answer[shared] for answer in answers]

    def _chances(self, examples: Sequence[Encoded], answers: Sequence[Sequence[int]]) -> torch.Tensor:
        """Probabilities of the three answers, (questions, 3) in float32."""
        model, device = self._base.model, input_device(self._base.model)
        batch: dict[str, Any] = {
            name: tensor.to(device)
            for name, tensor in pad_right(examples, self._base.tokenizer.pad_token_id).items()
            if name != "labels"
        }
        with torch.no_grad():
            logits = model(**batch, use_cache=False).logits
        last = torch.tensor([len(example.ids) - 1 for example in examples], device=logits.device)
        final = logits[torch.arange(len(examples), device=logits.device), last].float()
        return final.gather(1, torch.tensor([list(row) for row in answers], device=logits.device)).softmax(dim=-1).cpu()


def text_score(concept: float) -> TextScore:
    """What a rating of the concept, from 0 to 2, says as a scorer's verdict."""
    return TextScore(concept / 2, concept >= _HAS)


def load_judge(name: str) -> JudgeModel:
    """The judge `judge:FOLDER`, or of a hub id.

    Raises:
        ModelError: it cannot be loaded.
    """
    return JudgeModel(name, load_base(name.removeprefix(JUDGE), LoadOptions()))
