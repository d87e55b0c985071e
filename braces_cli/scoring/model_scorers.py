"""Any Hugging Face text classifier, from a folder or the hub.

A language model as the judge of texts: concept, relevance and fluency, each from 0 to 2, as AxBench has them.

The judge is asked for a number, and what counts is not what it would write but the probabilities of the three possible
answers: a rating is 0 P(0) + 1 P(1) + 2 P(2), the probabilities of the three adding up to 1. Any causal language model
will do that follows instructions; one that was only trained to continue texts gives numbers that mean little.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch

from braces_cli.core.errors import ModelError
from braces_cli.core.models.hub import explained
from braces_cli.core.models.load import Base, input_device, load_base, with_padding
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
from braces_cli.scoring.scorers import TextScore, checked

_BATCH = 32


class HubClassifier:
    """Probabilities of a sequence classifier; one of several labels each on its own (`multi_label_classification`)
    counts from one half on, else the likeliest counts.
    """

    def __init__(self, name: str, model: Any, tokenizer: Any) -> None:
        self.name = name
        self._model = model.eval()
        self._tokenizer = tokenizer
        self.labels = tuple(model.config.id2label[index] for index in range(model.config.num_labels))
        self._single = len(self.labels) == 1 or model.config.problem_type == "multi_label_classification"

    def score(self, texts: Sequence[str], label: str) -> list[TextScore]:
        column = self.labels.index(label)
        text_scores = []
        for start in range(0, len(texts), _BATCH):
            probabilities = self._probabilities(list(texts[start : start + _BATCH]))
            has = probabilities[:, column] >= 0.5 if self._single else probabilities.argmax(dim=1) == column
            values = checked(self.name, probabilities[:, column].tolist())
            text_scores += [TextScore(value, flag) for value, flag in zip(values, has.tolist(), strict=True)]
        return text_scores

    def _probabilities(self, texts: list[str]) -> torch.Tensor:
        """(texts, labels)."""
        limit = int(getattr(self._model.config, "max_position_embeddings", None) or 512)
        batch = self._tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=limit)
        with torch.no_grad():
            logits = self._model(**batch.to(self._model.device)).logits.float()
        return logits.sigmoid() if self._single else logits.softmax(dim=-1)


def load_hub_classifier(name: str, device: str = "cpu") -> HubClassifier:
    """A classifier by folder or hub id.

    Raises:
        ModelError: it cannot be loaded, or has no classification head of its own.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    def load() -> tuple[Any, Any, Any]:
        # A classifier is never allowed to bring code: `--trust-remote-code` is meant for the base.
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        return tokenizer, *AutoModelForSequenceClassification.from_pretrained(
            name, output_loading_info=True, trust_remote_code=False
        )

    tokenizer, model, info = explained(name, load, "classifier")
    if info["missing_keys"]:
        # A base model loads as a classifier, too, with a head of random numbers.
        missing = sorted(info["missing_keys"])[0]
        hint = "Give the folder or hub id of a sequence classifier."
        raise ModelError(f"it has no trained head ({missing} is missing)", where=name, hint=hint)
    tokenizer = with_padding(tokenizer)
    if model.config.pad_token_id is None:  # where a text ends, to a model that reads from the left
        model.config.pad_token_id = tokenizer.pad_token_id
    return HubClassifier(name, model.to(device), tokenizer)


JUDGE = "judge:"
_JUDGE_BATCH = 8
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
        for rows in by_length(examples, _JUDGE_BATCH):
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
