"""The built-in word lists."""

import re

from braces_cli.core.attributes.words import OPPOSITES, REFERENCE, built_in

NAMES = {
    "positive", "negative", "toxic", "polite", "formal", "casual", "joyful", "sad", "angry", "fearful", "neutral",
}  # fmt: skip


def test_lists_hold_about_forty_single_lower_case_words_without_repeats():
    """No word is shared with the reference list or the opposite list."""
    lists = built_in()
    assert set(lists) == NAMES
    for name, words in lists.items():
        assert 38 <= len(words) <= 42
        assert len(set(words)) == len(words)
        assert [word for word in words if not re.fullmatch("[a-z]+", word)] == []
        for other in {REFERENCE, OPPOSITES.get(name, REFERENCE)} - {name}:
            assert not set(words) & set(lists[other])
