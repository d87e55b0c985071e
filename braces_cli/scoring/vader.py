"""Sentiment by VADER: a lexicon with rules for negation, emphasis and capitals.

A text is positive where its compound score is at least 0.05 and negative where it is at most -0.05, which is how its
authors read it; what lies between is neither.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from braces_cli.core.utils.errors import ConfigError
from braces_cli.scoring.scorer import TextScore, checked
from braces_cli.scoring.word_tokens import split_words

THRESHOLD = 0.05


class Vader:
    """Compound score in [-1, 1] for `positive`, and minus that for `negative`.

    Args:
        exclude: words taken out of the lexicon.

    Raises:
        ConfigError: the package is missing.
    """

    name = "vader"
    labels = ("positive", "negative")

    def __init__(self, exclude: Collection[str] = ()) -> None:
        try:
            from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
        except ImportError as error:
            hint = "pip install vaderSentiment; braces-cli asks for it itself."
            raise ConfigError("VADER is not installed", where="--scorer vader", hint=hint) from error
        self._analyzer = SentimentIntensityAnalyzer()
        for word in split_words(exclude):
            self._analyzer.lexicon.pop(word, None)

    def score(self, texts: Sequence[str], label: str) -> list[TextScore]:
        sign = 1.0 if label == "positive" else -1.0
        values = checked(self.name, [sign * self._analyzer.polarity_scores(text)["compound"] for text in texts])
        return [TextScore(value, value >= THRESHOLD) for value in values]
