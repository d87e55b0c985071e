"""Diversity of generated texts: distinct n-grams and repetition. Words and punctuation marks count, in lower case."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from braces_cli.scoring.word_tokens import pieces_of

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
