"""The classifier that users fit: it learns, keeps out what it must not see, and comes back from disk the same."""

from __future__ import annotations

import pytest

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
def test_it_learns_what_the_labels_mean(labels):
    """Two labels and three; each text's probabilities add up to one; rows held out are measured."""
    fitted = fit_classifier(*rows(*labels))
    for label in labels:
        texts = [f"a {word} thing" for word in WORDS[label]]
        assert all(score.has and score.value > 0.5 for score in fitted.score(texts, label))
    assert fitted.probabilities(["a lovely thing", "nothing known"]).sum(axis=1) == pytest.approx([1, 1])
    assert fitted.measured["accuracy"] > fitted.measured["majority"]


def test_scikit_learn_says_the_same():
    """Our weights from disk against its own pipeline."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    texts, labels = rows("negative", "neutral", "positive")
    plain = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"[a-z]+"),
        LogisticRegression(C=4.0, max_iter=2000),
    ).fit(texts, labels)
    probes = ["a lovely blue hotel", "bad and dull", "great"]
    assert fit_classifier(texts, labels).probabilities(probes) == pytest.approx(plain.predict_proba(probes), abs=1e-4)


def test_words_left_out_are_never_seen():
    """Neither alone nor in a pair, at fitting and at scoring alike."""
    texts, labels = rows("negative", "positive")
    fitted = fit_classifier(texts, labels, exclude=["Lovely"])
    assert not [entry for entry in fitted.vocabulary if "lovely" in entry.split()]
    assert any("great" in entry.split() for entry in fitted.vocabulary)
    assert fitted.probabilities(["a lovely thing"]) == pytest.approx(fitted.probabilities(["a thing"]))


@pytest.mark.parametrize(
    ("texts", "labels", "message"),
    [
        (["a", "b"], ["x", "x"], "all rows have one label"),
        (["a b", "c d", "e f"], ["x", "x", "y"], "only one row is `y`"),
        (["?", "!", ".", ";"], ["x", "x", "y", "y"], "no words"),
    ],
)
def test_rows_that_teach_nothing(texts, labels, message):
    """Bad data, told as such."""
    with pytest.raises(DataError, match=message):
        fit_classifier(texts, labels)
