"""A small template language: `[a|b]` is replaced by one of its parts, `{name}` by one of the words passed for it."""

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
    """Split a string of entries, separated by commas, into a list."""
    return [" ".join(entry.split()) for entry in text.split(",") if entry.strip()]


@lru_cache(maxsize=100_000)
def _parts(text: str) -> tuple[str, ...]:
    return tuple(text.split("|"))


def expand(rng: random.Random, template: str, slots: Slots) -> str:
    """Return a sentence or phrase of a template. Slots may hold templates; articles fit the next word."""

    def choose(match: re.Match[str]) -> str:
        return rng.choice(_parts(match[1]))

    def fill(match: re.Match[str]) -> str:
        value = slots[match[1]]
        return value if isinstance(value, str) else rng.choice(value)

    while "[" in template or "{" in template:
        template = _SLOT.sub(fill, _CHOICE.sub(choose, template))
    return _ARTICLE.sub(r"\1n ", template) if "a " in template or "A " in template else template


def sentence(text: str, end: str = ".") -> str:
    """Add a capital letter and a full stop where missing."""
    text = text.strip()
    text = text[:1].upper() + text[1:]
    return text if text.endswith((".", "!", "?")) else text + end


def listed(items: Sequence[str], joint: str = "and") -> str:
    """Return `a, b and c`."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} {joint} {items[-1]}"
