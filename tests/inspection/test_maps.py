"""Words as tokens of a vocabulary, and maps on disk."""

from __future__ import annotations

import pytest

from braces_cli.core.errors import ConfigError, DataError, ModelError
from braces_cli.core.models.tokenize import encode_word
from braces_cli.inspection.maps import Concept, Vocabulary, best_first, open_map, write_map
from braces_cli.inspection.search import model_concept, top_vectors_for_concept
from braces_cli.inspection.vocabulary import map_header, value_tokens

WORDS = Vocabulary(["happy", " happy", "Happy", " Happy", "un", " un", "�", "�", "king"])


def never(word):
    pytest.fail(f"split {word}")


@pytest.mark.parametrize(
    ("word", "tokens"), [("happy", [0, 1, 2, 3]), ("Happy", [2, 3]), (" happy", [1]), ("id:6", [6])]
)
def test_forms_of_a_word_that_is_one_token(word, tokens):
    """With and without a leading space and, in lower case, capitalised."""
    assert WORDS.concept([word], never).tokens == tokens


@pytest.mark.parametrize("text", ["id:1.5", "id:x", "id:", "id:-1", "id:9", "id:²", "", "  "])
def test_words_outside_the_vocabulary(text):
    """An invalid token number is an error, unless a token has this text."""
    with pytest.raises(ConfigError, match=r"no token|is not a token"):
        WORDS.concept([text], lambda word: [])
    assert Vocabulary(["id:x"]).concept(["id:x"], never).tokens == [0]


def test_measure_of_a_concept():
    """The mean over the words; of a word the best form; of a form the mean over its tokens."""
    found = WORDS.concept(["unhappy", "king"], lambda word: {"unhappy": [5, 0]}[word])
    assert found.forms == (((5, 0),), ((8,),))
    assert found.measure({5: (1, 4.0), 0: (4, 2.0), 8: (2, 1.0)}) == ((2.5 + 2) / 2, (3 + 1) / 2)
    assert Concept((((0,), (1,)),)).measure({0: (5, 9.0), 1: (2, 1.0)}) == (2, 1.0)


def test_rank_comes_before_score():
    """A high score at a low rank does not come first."""
    figures = [(400, 11.0), (1, 5.0), (1, 6.0)]
    rows = [{"layer": 0, "index": i, "rank": rank, "score": score} for i, (rank, score) in enumerate(figures)]
    assert [row["index"] for row in sorted(rows, key=best_first)] == [2, 1, 0]


def test_single_token():
    """The token with a leading space comes first; `id:` names any token."""
    assert WORDS.single("happy", "--target") == 1
    assert WORDS.single("king", "--target") == 8
    assert WORDS.single("id:0", "--target") == 0
    with pytest.raises(ConfigError, match="Did you mean happy"):
        WORDS.single("hapy", "--target")


def written(session, path, top_k=3, **header):
    """Write a map of the session's model and open it."""
    assert write_map(path, map_header(session, "value", top_k) | header, value_tokens(session, top_k=top_k)) == 104
    return open_map(path)


def test_map_and_model_agree(session, lens, tmp_path):
    """The same vectors in the same order with the same figures."""
    found = written(session, tmp_path / "map.parquet", top_k=20)
    assert found.header == map_header(session, "value", 20)
    concept = model_concept(session, lens, [" film"])
    rows = found.search(concept, 8)
    direct = top_vectors_for_concept(session, lens, concept, limit=8, top_k=20)
    assert rows
    for row, other in zip(rows, direct, strict=False):
        for key in ("layer", "index", "rank"):
            assert row[key] == other[key]
        assert row["score"] == pytest.approx(other["score"], rel=1e-5)
        assert [(t["id"], t["token"]) for t in row["tokens"]] == [(t["id"], t["token"]) for t in other["tokens"]]
    assert {row["layer"] for row in found.search(concept, 100, [1])} == {1}


def test_file_that_is_not_a_map(tmp_path):
    """A DataError."""
    path = tmp_path / "map.parquet"
    path.write_text('{"layer": 1}\n')
    with pytest.raises(DataError, match="not a map"):
        open_map(path)


def test_interrupted_map_leaves_no_file(tmp_path, session):
    """Maps are written atomically."""

    def broken():
        yield next(value_tokens(session))
        raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError):
        write_map(tmp_path / "map.parquet", map_header(session, "value", 10), broken())
    assert list(tmp_path.iterdir()) == []


def test_map_of_another_model(tmp_path, session):
    """Other weights or another vocabulary of the same size are an error."""
    found = written(session, tmp_path / "map.parquet")
    fingerprint, tokenizer = session.base.fingerprint, found.header["tokenizer"]
    found.check_model(fingerprint, tokenizer)
    with pytest.raises(ModelError, match="other weights"):
        found.check_model(fingerprint | {"sha256": "0"}, tokenizer)
    with pytest.raises(ModelError, match="another vocabulary"):
        found.check_model(fingerprint, {"vocabulary": "0"})


def test_map_splits_words_like_its_model(tmp_path, session):
    """With the tokenizer in the model's folder; an error if the folder does not exist."""
    path = tmp_path / "map.parquet"
    assert written(session, path).split("badness") == encode_word(session.base.tokenizer, "badness")
    with pytest.raises(ConfigError, match="not a single token"):
        written(session, path, model="gone/away").split("badness")
