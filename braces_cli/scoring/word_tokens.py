"""Words of a text, as all scorers split them."""

from __future__ import annotations

import re
from collections.abc import Iterable

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
