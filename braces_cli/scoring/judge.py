"""A language model as a judge of texts: concept, relevance and fluency, each from 0 to 2, as in AxBench.

A rating is the expectation 0 P(0) + 1 P(1) + 2 P(2) over the three possible answers, whose probabilities are normalised
to sum to 1. The model must follow instructions; ratings of a model that only continues texts mean little.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from braces_cli.core.models.load import Base, input_device, load_base
from braces_cli.core.models.tokenize import (
    Encoded,
    by_length,
    common_length,
    context_length,
    encode,
    encode_answer,
    has_template,
    pad_right,
)
from braces_cli.core.options import LoadOptions
from braces_cli.scoring.scorers import JUDGE, TextScore, checked

_BATCH = 8
_ANSWERS = ("0", "1", "2")
# A text with at least this rating has the concept.
_HAS = 1.0
_QUESTIONS = {
    "concept": "How much is this text {label}? 0: not at all, 1: somewhat, 2: clearly.",
    "relevance": "How well does this text go with the prompt before it? 0: not at all, 1: partly, 2: well.",
    "fluency": "How fluent is the language of this text? 0: not fluent, 1: somewhat fluent, 2: fluent.",
}
# The text comes first, because input beyond the context is cut at the beginning and the question must remain.
_TEMPLATE = "{prompt}Text: {text}\n\nQuestion: {question} Answer with the number only.\nAnswer:"


@dataclass(frozen=True)
class Rating:
    """Ratings of one text, each from 0 to 2."""

    concept: float
    relevance: float
    fluency: float

    @property
    def overall(self) -> float:
        """Harmonic mean of the three; 0 if one of them is 0."""
        parts = (self.concept, self.relevance, self.fluency)
        return 3 / sum(1 / part for part in parts) if min(parts) > 0 else 0.0

    @property
    def score(self) -> TextScore:
        """The concept rating as a score."""
        return TextScore(self.concept / 2, self.concept >= _HAS)


class Judge:
    """Ratings by a causal language model; a label is any name of a concept."""

    labels: tuple[str, ...] = ()

    def __init__(self, name: str, base: Base) -> None:
        self.name = name
        self._base = base
        self._window = context_length(base.model.config, base.tokenizer)

    def score(self, texts: Sequence[str], label: str) -> list[TextScore]:
        """Return the concept ratings of texts, without their prompts, as scores."""
        concepts = self._ratings("concept", [""] * len(texts), texts, label)
        return [Rating(concept, 0.0, 0.0).score for concept in concepts]

    def rate(self, prompts: Sequence[str], texts: Sequence[str], label: str) -> list[Rating]:
        """Return the ratings of texts after their prompts."""
        parts = [self._ratings(question, prompts, texts, label) for question in _QUESTIONS]
        return [Rating(*values) for values in zip(*parts, strict=True)]

    def _ratings(self, question: str, prompts: Sequence[str], texts: Sequence[str], label: str) -> Sequence[float]:
        """Return one rating of each text."""
        about = _QUESTIONS[question].format(label=label.replace("_", " "))
        examples: list[Encoded] = []
        # The token of each answer.
        answers: list[list[int]] = []
        for prompt, text in zip(prompts, texts, strict=True):
            whole = _TEMPLATE.format(prompt=f"Prompt: {prompt}\n\n" if prompt else "", text=text, question=about)
            ids, tokens = self._encode(whole)
            examples.append(Encoded(ids, ids, False, False))
            answers.append(tokens)
        model, device = self._base.model, input_device(self._base.model)
        values = [0.0] * len(examples)
        for rows in by_length(examples, _BATCH):
            batch = pad_right([examples[row] for row in rows], self._base.tokenizer.pad_token_id)
            del batch["labels"]
            with torch.no_grad():
                logits = model(**{name: tensor.to(device) for name, tensor in batch.items()}, use_cache=False).logits
            for place, row in enumerate(rows):
                final = logits[place, len(examples[row].ids) - 1].float()
                probabilities = final[answers[row]].softmax(dim=-1).cpu()
                values[row] = sum(rating * float(p) for rating, p in enumerate(probabilities))
        return checked(self.name, values)

    def _encode(self, question: str) -> tuple[list[int], list[int]]:
        """Return the tokens up to the first difference between the three answers, and each answer's token there."""
        tokenizer = self._base.tokenizer
        if has_template(tokenizer):
            encoded = [encode_answer(tokenizer, question, answer).ids for answer in _ANSWERS]
        else:
            encoded = [encode(tokenizer, question, f" {answer}").ids for answer in _ANSWERS]
        shared = min(common_length(encoded[0], other) for other in encoded[1:])
        return encoded[0][:shared][-self._window :], [ids[shared] for ids in encoded]


def load_judge(name: str) -> Judge:
    """Load the judge `judge:MODEL`, a folder or hub id.

    Raises:
        ModelError: a model that cannot be loaded.
    """
    return Judge(name, load_base(name.removeprefix(JUDGE), LoadOptions()))
