"""A small template language: `[a|b]` is one of its parts, `{name}` one of the words that the caller gives for it."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache

_CHOICE = re.compile(r"\[([^\[\]]*)\]")
_SLOT = re.compile(r"\{(\w+)\}")
_ARTICLE = re.compile(r"\b([Aa]) (?=(?:[aeio]|un|ug|um)\w)(?!one|on a|uni|eu)")
_START = re.compile(r"(^|[.!?] )([a-z])")

Slots = Mapping[str, str | Sequence[str]]


def words(text: str) -> list[str]:
    """A list written as one string: entries between commas, of several lines if need be."""
    return [" ".join(entry.split()) for entry in text.split(",") if entry.strip()]


@lru_cache(maxsize=100_000)
def _parts(text: str) -> tuple[str, ...]:
    return tuple(text.split("|"))


def expand(rng: random.Random, template: str, slots: Slots) -> str:
    """One sentence or phrase of a template; slots may hold templates themselves. Articles fit what follows them."""

    def choose(match: re.Match[str]) -> str:
        return rng.choice(_parts(match[1]))

    def fill(match: re.Match[str]) -> str:
        value = slots[match[1]]
        return value if isinstance(value, str) else rng.choice(value)

    while "[" in template or "{" in template:
        template = _SLOT.sub(fill, _CHOICE.sub(choose, template))
    return _ARTICLE.sub(r"\1n ", template) if "a " in template or "A " in template else template


def sentence(text: str, end: str = ".") -> str:
    """Capital in front and a full stop behind, where they are missing."""
    text = text.strip()
    text = text[:1].upper() + text[1:]
    return text if text.endswith((".", "!", "?")) else text + end


def listed(items: Sequence[str], joint: str = "and") -> str:
    """`a, b and c`."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} {joint} {items[-1]}"
