"""A small classifier that users fit from their own labelled rows: TF-IDF of words and pairs, logistic regression."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from braces_cli.core.errors import DataError
from braces_cli.scoring.scorers import TextScore, checked, split_words, words_of

# Every tenth row is held out to measure; the classifier itself then learns from all.
_HELD_OUT = 10


@dataclass
class Classifier:
    """A fitted classifier; the label of a text is its likeliest one.

    Attributes:
        labels: in the order of `weight`'s rows.
        vocabulary: words and pairs of words, in the order of its columns.
        excluded: words that it has never seen and does not look at.
        measured: `accuracy` on the rows held out, `majority` (that of always guessing the commonest label), `rows`.
    """

    labels: tuple[str, ...]
    vocabulary: list[str]
    idf: np.ndarray
    weight: np.ndarray
    bias: np.ndarray
    excluded: set[str] = field(default_factory=set)
    measured: dict[str, Any] = field(default_factory=dict)
    name: str = "classifier"

    def __post_init__(self) -> None:
        self._vectorizer = _vectorizer(self.excluded, vocabulary=self.vocabulary)
        self._vectorizer.idf_ = self.idf

    def probabilities(self, texts: Sequence[str]) -> np.ndarray:
        """Probability of each label, (texts, labels)."""
        scores = self._vectorizer.transform(texts) @ self.weight.T + self.bias
        powers = np.exp(scores - scores.max(axis=1, keepdims=True))
        result: np.ndarray = powers / powers.sum(axis=1, keepdims=True)
        return result

    def score(self, texts: Sequence[str], label: str) -> list[TextScore]:
        if not texts:
            return []
        probabilities = self.probabilities(texts)
        column = self.labels.index(label)
        likeliest = probabilities.argmax(axis=1) == column
        values = checked(self.name, probabilities[:, column].tolist())
        return [TextScore(value, bool(has)) for value, has in zip(values, likeliest, strict=True)]


def fit_classifier(texts: Sequence[str], labels: Sequence[str], exclude: Collection[str] = ()) -> Classifier:
    """Fit on labelled texts.

    Args:
        exclude: words that are cut from every text before anything else.

    Raises:
        DataError: fewer than two labels, or one with fewer than two texts.
    """
    counts = Counter(labels)
    rare = [label for label, count in counts.items() if count < 2]
    if len(counts) < 2 or rare:
        what = f"only one row is `{rare[0]}`" if rare else "all rows have one label"
        raise DataError(what, hint="A classifier needs at least two labels, and several rows of each.")
    excluded = split_words(exclude)
    held_out = [row for row in range(len(texts)) if row % _HELD_OUT == _HELD_OUT - 1]
    learnt = [row for row in range(len(texts)) if row % _HELD_OUT != _HELD_OUT - 1]
    measured: dict[str, Any] = {"rows": len(texts), "accuracy": None, "majority": None}
    if held_out and len({labels[row] for row in learnt}) > 1:
        trial = _fit([texts[row] for row in learnt], [labels[row] for row in learnt], excluded)
        guessed = trial.probabilities([texts[row] for row in held_out]).argmax(axis=1)
        truth = [labels[row] for row in held_out]
        right = sum(trial.labels[guess] == label for guess, label in zip(guessed, truth, strict=True))
        measured["accuracy"] = right / len(held_out)
        measured["majority"] = max(Counter(truth).values()) / len(held_out)
    fitted = _fit(texts, labels, excluded)
    fitted.measured = measured
    return fitted


def _fit(texts: Sequence[str], labels: Sequence[str], excluded: set[str]) -> Classifier:
    from sklearn.linear_model import LogisticRegression

    # A word seen once says nothing, but a handful of rows may have no other words.
    vectorizer = _vectorizer(excluded, min_df=2 if len(texts) >= 100 else 1)
    try:
        features = vectorizer.fit_transform(texts)
    except ValueError as error:
        raise DataError("no words in the rows", hint="A classifier needs texts with words.") from error
    model = LogisticRegression(C=4.0, max_iter=2000).fit(features, labels)
    weight, bias = model.coef_, model.intercept_
    if len(weight) == 1:
        # Two labels share one row of weights; written as two, both cases are one.
        weight, bias = np.vstack([np.zeros_like(weight), weight]), np.concatenate([np.zeros_like(bias), bias])
    vocabulary = vectorizer.get_feature_names_out().tolist()
    return Classifier(tuple(map(str, model.classes_)), vocabulary, vectorizer.idf_, weight, bias, excluded)


def _vectorizer(excluded: set[str], vocabulary: list[str] | None = None, min_df: int = 1) -> Any:
    from sklearn.feature_extraction.text import TfidfVectorizer

    def cut(text: str) -> list[str]:
        # Cut before pairs are built: no pair may hold an excluded word, either.
        return [word for word in words_of(text) if word not in excluded]

    return TfidfVectorizer(
        tokenizer=cut,
        token_pattern=None,
        lowercase=False,
        ngram_range=(1, 2),
        sublinear_tf=True,
        min_df=min_df,
        vocabulary=vocabulary,
    )
