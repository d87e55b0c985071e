"""Any Hugging Face text classifier, from a folder or the hub."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from braces_cli.core.models.hub_errors import explained
from braces_cli.core.models.loading import with_padding
from braces_cli.core.utils.errors import ModelError
from braces_cli.scoring.scorer import TextScore, checked

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
