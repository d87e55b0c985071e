"""The built-in word lists."""

from __future__ import annotations

import re

import pytest

from braces_cli.core.attributes.words import REFERENCE, built_in

NAMES = {
    "positive", "negative", "toxic", "polite", "formal", "casual", "joyful", "sad", "angry", "fearful", "neutral",
}  # fmt: skip


def test_every_list_is_there():
    """Ten attributes, and the reference."""
    assert set(built_in()) == NAMES
    assert REFERENCE in NAMES


@pytest.mark.parametrize("name", sorted(NAMES))
def test_a_list_is_about_forty_single_lower_case_words_without_repeats(name):
    """No word is shared with the reference list."""
    words = built_in()[name]
    assert 38 <= len(words) <= 42
    assert len(set(words)) == len(words)
    assert [word for word in words if not re.fullmatch("[a-z]+", word)] == []
    if name != REFERENCE:
        assert not set(words) & set(built_in()[REFERENCE])


@pytest.mark.parametrize(("one", "other"), [("positive", "negative"), ("joyful", "sad"), ("polite", "toxic"),
                                            ("formal", "casual"), ("angry", "fearful")])  # fmt: skip
def test_opposites_share_no_word(one, other):
    assert not set(built_in()[one]) & set(built_in()[other])
