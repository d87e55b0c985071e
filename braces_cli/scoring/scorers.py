"""Words of a text, as all scorers split them.

The interface of scorers: texts -> verdicts about a label.

Toxicity by a list of words that come with braces: no service, no model.

A text is toxic where it holds a listed word or phrase: profanity, insults, threats. The list names no group of people,
so an attack on one in civil words is not seen; a fitted or a Hugging Face classifier can see it.

Sentiment by VADER: a lexicon with rules for negation, emphasis and capitals.

A text is positive where its compound score is at least 0.05 and negative where it is at most -0.05, which is how its
authors read it; what lies between is neither.

Diversity of generated texts: distinct n-grams and repetition. Words and punctuation marks count, in lower case.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Protocol

from braces_cli.core.errors import BracesError, ConfigError

_WORD = re.compile(r"[^\W_]+(?:['\u2019][^\W_]+)*")
_PIECE = re.compile(r"[^\W_]+(?:['\u2019][^\W_]+)*|[^\w\s]")


def words_of(text: str) -> list[str]:
    """Words in lower case, punctuation left out; an apostrophe inside a word belongs to it."""
    return [word.replace("\u2019", "'") for word in _WORD.findall(text.lower())]


def pieces_of(text: str) -> list[str]:
    """Words in lower case and single punctuation marks."""
    return _PIECE.findall(text.lower())


def split_words(phrases: Iterable[str]) -> set[str]:
    """All words of several words and phrases."""
    return {word for phrase in phrases for word in words_of(phrase)}


@dataclass(frozen=True)
class TextScore:
    """About one text: `value` grows with the strength of the label, `has` says whether the text counts as having it."""

    value: float
    has: bool


class Scorer(Protocol):
    """Scores texts for labels.

    Attributes:
        name: as the user gave it.
        labels: labels that `judge` knows; none where it takes any.
    """

    @property
    def name(self) -> str: ...

    @property
    def labels(self) -> tuple[str, ...]: ...

    def score(self, texts: Sequence[str], label: str) -> list[TextScore]:
        """A score of each text.

        Raises:
            BracesError: it cannot score.
        """
        ...


def checked(name: str, values: Sequence[float]) -> Sequence[float]:
    """The values, all of them finite.

    Raises:
        BracesError: one is not.
    """
    bad = next((index for index, value in enumerate(values) if not math.isfinite(value)), None)
    if bad is not None:
        raise BracesError(f"{name} gave {values[bad]} for text {bad}", hint="A text without a score is not scored 0.")
    return values


class ToxicWords:
    """Listed words for each word of a text, in [0, 1]; an entry that ends in `*` stands for all words it begins.

    Args:
        exclude: words that do not count; entries that hold one are left out.
    """

    name = "toxicity"
    labels = ("toxic",)

    def __init__(self, exclude: Collection[str] = ()) -> None:
        skipped = split_words(exclude)
        text = (resources.files("braces_cli.assets") / "scoring" / "toxic.txt").read_text(encoding="utf-8")
        entries = [line.split() for line in text.splitlines() if line and not line.startswith("#")]
        entries = [entry for entry in entries if not skipped & {word.rstrip("*") for word in entry}]
        self._skipped = skipped
        self._starts = tuple(entry[0][:-1] for entry in entries if entry[0].endswith("*"))
        self._exact = {entry[0] for entry in entries if len(entry) == 1}
        self._phrases = [entry for entry in entries if len(entry) > 1]

    def score(self, texts: Sequence[str], label: str) -> list[TextScore]:
        return [self._score(words_of(text)) for text in texts]

    def _score(self, words: list[str]) -> TextScore:
        count = sum(self._listed(word) for word in words)
        for phrase in self._phrases:
            width = len(phrase)
            count += sum(words[start : start + width] == phrase for start in range(len(words) - width + 1))
        return TextScore(count / max(len(words), 1), count > 0)

    def _listed(self, word: str) -> bool:
        word = word.removesuffix("'s")
        if word in self._skipped:
            return False
        return word in self._exact or (bool(self._starts) and word.startswith(self._starts))


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


REPETITION_WIDTH = 4


def _grams(text: str, width: int) -> list[tuple[str, ...]]:
    pieces = pieces_of(text)
    return list(zip(*(pieces[start:] for start in range(width)), strict=False))


def distinct(groups: Iterable[Sequence[str]], width: int) -> float:
    """distinct-n: different n-grams over all n-grams of a group of texts (the samples of a prompt), mean over groups.

    Groups too short for a single n-gram are left out; NaN where nothing is left. It falls as groups get longer, so
    compare only groups of as many samples of the same length.
    """
    shares = []
    for texts in groups:
        grams = [gram for text in texts for gram in _grams(text, width)]
        if grams:
            shares.append(len(set(grams)) / len(grams))
    return sum(shares) / len(shares) if shares else math.nan


def repetition(texts: Iterable[str]) -> float:
    """Share of a text's 4-grams that stood in it before, mean over texts that have one; NaN where none has."""
    shares = []
    for text in texts:
        grams = _grams(text, REPETITION_WIDTH)
        if grams:
            shares.append(1 - len(set(grams)) / len(grams))
    return sum(shares) / len(shares) if shares else math.nan
