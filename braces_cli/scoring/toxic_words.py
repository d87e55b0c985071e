"""Toxicity by a list of words that come with braces: no service, no model.

A text is toxic where it holds a listed word or phrase: profanity, insults, threats. The list names no group of people,
so an attack on one in civil words is not seen; a fitted or a Hugging Face classifier can see it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from importlib import resources

from braces_cli.scoring.scorer import TextScore
from braces_cli.scoring.word_tokens import split_words, words_of


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
