"""What a word is in a model's tokens, and how much a vector promotes it. Imports no torch.

    rank, score of a form      mean over its tokens of the token's rank among all tokens and of its score
    rank, score of a word      those of its best form
    rank, score of a concept   mean over its words

Vectors are ordered by rank and, where that is equal, by score. Scores alone would not do: adding a constant to all of a
vector's scores changes nothing that the model says, so a high score may mean no more than a vector whose scores are
high for every token.

The forms of a word are the single tokens that spell it: with and without a space in front, as written and, for a word
in small letters, with a capital. A word that is no single token has one form, the several tokens into which the model's
own tokenizer splits it inside a sentence. A word that begins with a space is that token alone, and `id:123` is the
token with that number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from braces_cli.core.utils.errors import ConfigError, near_misses
from braces_cli.core.utils.numbers import whole_number

Form = tuple[int, ...]


@dataclass(frozen=True)
class Concept:
    """Words to look for: for each word the token sequences that count as it."""

    words: tuple[str, ...]
    forms: tuple[tuple[Form, ...], ...]

    @property
    def tokens(self) -> list[int]:
        """Every token of every form, in order of their numbers."""
        return sorted({token for forms in self.forms for form in forms for token in form})

    def measure(self, tokens: Mapping[int, tuple[float, float]]) -> tuple[float, float]:
        """(rank, score) of the concept for a vector with these (rank, score) of its tokens."""
        words = []
        for forms in self.forms:
            means = [tuple(sum(tokens[t][part] for t in form) / len(form) for part in (0, 1)) for form in forms]
            words.append(min(means, key=lambda mean: (mean[0], -mean[1])))
        rank, score = (sum(word[part] for word in words) / len(words) for part in (0, 1))
        return (int(rank) if rank == int(rank) else rank), score


def best_first(row: Mapping[str, Any]) -> tuple[float, float, int, int]:
    """Sorts rows of found vectors, best first."""
    return row["rank"], -row["score"], row["layer"], row["index"]


class Vocabulary:
    """Texts of all tokens, and which tokens have a text."""

    def __init__(self, texts: Sequence[str]) -> None:
        # Looked through for each word: a dictionary of lists would take longer to build than a search of a map.
        self.texts = texts

    def find(self, text: str) -> list[int]:
        """Tokens that read `text` exactly, lowest first."""
        found: list[int] = []
        with suppress(ValueError):  # there is none, or no further one
            while text:
                found.append(self.texts.index(text, found[-1] + 1 if found else 0))
        return found

    def number(self, text: str, where: str) -> int | None:
        """The token that `id:123` names, None for any other text.

        Raises:
            ConfigError: a number beyond the vocabulary, or none behind an `id:` that is no token either.
        """
        if not text.startswith("id:"):
            return None
        token = whole_number(text.removeprefix("id:"))
        if token is None and self.find(text):
            return None
        if token is None or token >= len(self.texts):
            what = f"no token {text.removeprefix('id:')}"
            raise ConfigError(what, where=where, hint=f"There is id:0 to id:{len(self.texts) - 1}.")
        return token

    def single(self, text: str, where: str) -> int:
        """One token for `text`: the one with a space in front, as words inside a sentence have, else as written.

        Raises:
            ConfigError: it is no single token.
        """
        number = self.number(text, where)
        if number is not None:
            return number
        spaced = [] if text.startswith(" ") else self.find(f" {text}")
        for token in (*spaced, *self.find(text)):
            return token
        raise self.unknown(text, where)

    def unknown(self, text: str, where: str) -> ConfigError:
        """The error for a text that is no token here, with near ones named."""
        same = [t for t in self.texts if t.strip()[:1].lower() == text.strip()[:1].lower()] if text.strip() else []
        close = near_misses(text.strip(), dict.fromkeys(t.strip() for t in same))
        hint = close or "Give a text that is one token, or id:NUMBER."
        return ConfigError(f"`{text}` is no token of this model", where=where, hint=hint)


def concept(
    words: Sequence[str], vocabulary: Vocabulary, split: Callable[[str], Sequence[int]], where: str = "TOKEN"
) -> Concept:
    """The tokens of some words.

    Args:
        split: the tokenizer's tokens of a word inside a sentence; asked only for words that are no single token.

    Raises:
        ConfigError: no words, or one that cannot be written in this vocabulary.
    """
    if not words:
        raise ConfigError("nothing to look for", where=where, hint="Give a word, several words, or --attribute NAME.")
    return Concept(tuple(words), tuple(_forms(word, vocabulary, split, where) for word in words))


def _forms(
    word: str, vocabulary: Vocabulary, split: Callable[[str], Sequence[int]], where: str
) -> tuple[tuple[int, ...], ...]:
    number = vocabulary.number(word, where)
    if number is not None:
        return ((number,),)
    spellings = [word] if word.startswith(" ") else [f" {word}", word]
    if word == word.lower() and not word.startswith(" "):
        spellings += [f" {word.capitalize()}", word.capitalize()]
    singles = dict.fromkeys(token for spelling in spellings for token in vocabulary.find(spelling))
    if singles:
        return tuple((token,) for token in singles)
    pieces = tuple(split(word.strip())) if word.strip() else ()
    if not pieces:
        raise vocabulary.unknown(word, where)
    return (pieces,)
