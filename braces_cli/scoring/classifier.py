"""A classifier fitted on the user's labelled rows: TF-IDF of words and pairs of words, logistic regression."""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from braces_cli.core.errors import DataError, logger
from braces_cli.scoring.scorers import TextScore, checked, split_words, words_of

# One row in ten is held out to measure the accuracy; the final classifier is fitted on all rows.
_HELD_OUT = 10


@dataclass
class Classifier:
    """A fitted classifier; a text has its likeliest label.

    Attributes:
        labels: in the order of the probabilities.
        pipeline: the vectorizer and the logistic regression.
    """

    name: str
    labels: tuple[str, ...]
    pipeline: Any

    def score(self, texts: Sequence[str], label: str) -> list[TextScore]:
        if not texts:
            return []
        probabilities = self.pipeline.predict_proba(texts)
        column = self.labels.index(label)
        likeliest = probabilities.argmax(axis=1) == column
        values = checked(self.name, probabilities[:, column].tolist())
        return [TextScore(value, bool(has)) for value, has in zip(values, likeliest, strict=True)]


def fit_classifier(name: str, texts: Sequence[str], labels: Sequence[str], exclude: Collection[str] = ()) -> Classifier:
    """Fit a classifier on labelled texts, and log its accuracy on held-out rows.

    Args:
        name: for messages.
        exclude: words that are removed from every text first.

    Raises:
        DataError: fewer than two labels, or a label with fewer than two texts.
    """
    from sklearn.model_selection import train_test_split

    counts = Counter(labels)
    rare = [label for label, count in counts.items() if count < 2]
    if len(counts) < 2 or rare:
        what = f"only one row is `{rare[0]}`" if rare else "all rows have one label"
        raise DataError(what, where=name, hint="A classifier needs at least two labels, and several rows of each.")
    excluded = split_words(exclude)
    try:
        pipeline = _fit(texts, labels, excluded)
    except ValueError as error:
        raise DataError("no words in the rows", where=name, hint="A classifier needs texts with words.") from error
    fitted_on, held_out, known, truth = train_test_split(texts, labels, test_size=1 / _HELD_OUT, random_state=0)
    if len(texts) >= _HELD_OUT and len(set(known)) > 1:
        accuracy = _fit(fitted_on, known, excluded).score(held_out, truth)
        largest = max(Counter(truth).values()) / len(truth)
        logger.info("%s: accuracy %.3f on held-out rows, %.3f for the largest class", name, accuracy, largest)
    return Classifier(name, tuple(map(str, pipeline.classes_)), pipeline)


def _fit(texts: Sequence[str], labels: Sequence[str], excluded: set[str]) -> Any:
    """Return the fitted pipeline."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    def split(text: str) -> list[str]:
        # Before pairs are formed: no pair may have an excluded word.
        return [word for word in words_of(text) if word not in excluded]

    # A word that occurs once has no information, but a few rows may have no other words.
    rarest = 2 if len(texts) >= 100 else 1
    words = {"tokenizer": split, "token_pattern": None, "lowercase": False}
    vectorizer = TfidfVectorizer(**words, ngram_range=(1, 2), sublinear_tf=True, min_df=rarest)
    return make_pipeline(vectorizer, LogisticRegression(C=4.0, max_iter=2000)).fit(texts, labels)
