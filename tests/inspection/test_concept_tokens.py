"""Words as tokens of a vocabulary."""

from __future__ import annotations

import pytest

from braces_cli.core.errors import ConfigError
from braces_cli.inspection.maps import Concept, Vocabulary, best_first, concept

WORDS = Vocabulary(["happy", " happy", "Happy", " Happy", "un", " un", "�", "�", "king"])


def never(word):
    pytest.fail(f"asked to split {word}")


def test_a_word_counts_in_each_spelling_that_is_one_token():
    """With and without space, and capitalised."""
    assert concept(["happy"], WORDS, never).tokens == [0, 1, 2, 3]
    assert concept(["Happy"], WORDS, never).tokens == [2, 3]
    assert concept([" happy"], WORDS, never).tokens == [1]
    assert concept(["id:6"], WORDS, never).tokens == [6]


@pytest.mark.parametrize("text", ["id:1.5", "id:x", "id:", "id:-1", "id:9", "id:²"])
def test_a_number_that_is_none_is_no_word(text):
    """It would be looked up piece by piece, as words of several tokens are."""
    with pytest.raises(ConfigError, match="no token"):
        concept([text], WORDS, never)
    assert concept(["id:x"], Vocabulary(["id:x"]), never).tokens == [0]


def test_a_word_of_several_tokens_is_the_mean_of_them():
    """And of several words again the mean."""
    found = concept(["unhappy", "king"], WORDS, lambda word: {"unhappy": [5, 0]}[word])
    assert found.forms == (((5, 0),), ((8,),))
    rank, score = found.measure({5: (1, 4.0), 0: (4, 2.0), 8: (2, 1.0)})
    assert (rank, score) == ((2.5 + 2) / 2, (3 + 1) / 2)


def test_the_best_form_of_a_word_counts():
    """By rank, then by score."""
    found = Concept(("a",), (((0,), (1,)),))
    assert found.measure({0: (5, 9.0), 1: (2, 1.0)}) == (2, 1.0)


def test_rank_comes_before_score():
    """A vector that scores everything high promotes nothing in particular."""
    rows = [
        {"layer": 0, "index": i, "rank": r, "score": s} for i, (r, s) in enumerate([(400, 11.0), (1, 5.0), (1, 6.0)])
    ]
    assert [row["index"] for row in sorted(rows, key=best_first)] == [2, 1, 0]


@pytest.mark.parametrize(("word", "message"), [("id:9", "no token 9"), ("", "is no token"), ("  ", "is no token")])
def test_words_that_cannot_be_looked_for(word, message):
    """Errors with the remedy."""
    with pytest.raises(ConfigError, match=message):
        concept([word], WORDS, lambda w: [])


def test_a_single_token_prefers_the_space_in_front():
    """As a word inside a sentence has it; `id:` takes any."""
    assert WORDS.single("happy", "--target") == 1
    assert WORDS.single("king", "--target") == 8
    assert WORDS.single("id:0", "--target") == 0
    with pytest.raises(ConfigError, match="Did you mean happy"):
        WORDS.single("hapy", "--target")
