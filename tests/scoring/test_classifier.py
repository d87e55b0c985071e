"""The classifier that users fit on their rows: against scikit-learn, and excluded words."""

import logging
import re

import pytest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from braces_cli.core.errors import DataError
from braces_cli.scoring.classifier import fit_classifier

SUBJECTS = ["the film", "this book", "our dinner", "the hotel", "that song", "her play"]
WORDS = {"positive": ["lovely", "great", "fine"], "negative": ["awful", "bad", "dull"], "neutral": ["long", "blue"]}


def rows(*labels):
    made = [(f"{s} was {word} and {word}", label) for label in labels for s in SUBJECTS for word in WORDS[label]]
    order = sorted(made, key=lambda row: hash_of(row[0]))
    return [text for text, _ in order], [label for _, label in order]


def hash_of(text):
    return sum(ord(c) * 31**i for i, c in enumerate(text)) % 1009


@pytest.mark.parametrize("labels", [("negative", "positive"), ("negative", "neutral", "positive")])
def test_labels_are_learned(labels, caplog, monkeypatch):
    """The accuracy is measured on held-out rows."""
    monkeypatch.setattr(logging.getLogger("braces"), "propagate", True)
    caplog.set_level(logging.INFO, logger="braces")
    fitted = fit_classifier("mine", *rows(*labels))
    for label in labels:
        texts = [f"a {word} thing" for word in WORDS[label]]
        assert all(score.has and score.value > 0.5 for score in fitted.score(texts, label))
    accuracy, largest = map(float, re.findall(r"[01]\.\d+", caplog.messages[-1]))
    assert accuracy > largest


def test_probabilities_are_those_of_scikit_learn():
    texts, labels = rows("negative", "neutral", "positive")
    plain = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"[a-z]+"),
        LogisticRegression(C=4.0, max_iter=2000),
    ).fit(texts, labels)
    probes = ["a lovely blue hotel", "bad and dull", "great"]
    assert fit_classifier("mine", texts, labels).pipeline.predict_proba(probes) == pytest.approx(
        plain.predict_proba(probes), abs=1e-4
    )


def test_excluded_words_have_no_effect():
    """Neither alone nor in a pair, in fitting and in scoring."""
    texts, labels = rows("negative", "positive")
    fitted = fit_classifier("mine", texts, labels, exclude=["Lovely"])
    vocabulary = {word for entry in fitted.pipeline[0].get_feature_names_out() for word in entry.split()}
    assert "lovely" not in vocabulary
    assert "great" in vocabulary
    with_word, without = fitted.pipeline.predict_proba(["a lovely thing", "a thing"])
    assert with_word == pytest.approx(without)


@pytest.mark.parametrize(
    ("texts", "labels", "message"),
    [
        (["a", "b"], ["x", "x"], "all rows have one label"),
        (["a b", "c d", "e f"], ["x", "x", "y"], "only one row is `y`"),
        (["?", "!", ".", ";"], ["x", "x", "y", "y"], "no words"),
    ],
)
def test_rows_without_information_are_refused(texts, labels, message):
    with pytest.raises(DataError, match=message):
        fit_classifier("mine", texts, labels)
