"""Words as tokens of a vocabulary, and maps on disk."""

import pytest

from braces_cli.core.errors import ConfigError, DataError, ModelError
from braces_cli.core.models.tokenize import encode_word
from braces_cli.inspection.maps import Concept, Vocabulary, best_first, open_map, write_map
from braces_cli.inspection.vocabulary import map_header, value_tokens

WORDS = Vocabulary(["happy", " happy", "Happy", " Happy", "un", " un", "\ufffd", "\ufffd", "king"])


@pytest.mark.parametrize(
    ("word", "tokens"), [("happy", [1, 0, 3, 2]), ("Happy", [3, 2]), (" happy", [1]), ("id:6", [6]), ("king", [8])]
)
def test_forms_of_a_word_that_is_one_token(word, tokens):
    """With and without a leading space and, in lower case, capitalised; the first one is the single token."""
    assert WORDS.forms(word, "TOKEN") == [(token,) for token in tokens]
    assert WORDS.single(word, "TOKEN") == tokens[0]


@pytest.mark.parametrize("text", ["id:1.5", "id:x", "id:", "id:-1", "id:9", "id:\u00b2", "", "  ", "hapy"])
def test_words_outside_the_vocabulary(text):
    """Invalid numbers and unknown texts."""
    with pytest.raises(ConfigError, match=r"no token|is not a token"):
        WORDS.concept([text])


def test_words_of_several_tokens(session, lens):
    """The tokenizer splits them; characters that it cannot express are an error."""
    tokenizer = session.base.tokenizer
    assert lens.vocabulary.concept(["badness"], tokenizer).forms == [[tuple(encode_word(tokenizer, "badness"))]]
    for word, given in (("badness", None), ("\u6f22", tokenizer)):
        with pytest.raises(ConfigError, match="is not a token"):
            lens.vocabulary.concept([word], given)


def test_measure_of_a_concept():
    """The mean over the words; of a word the best form; of a form the mean over its tokens."""
    found = Concept([[(5, 0)], [(8,)]])
    assert found.tokens == [0, 5, 8]
    assert found.measure({5: (1, 4.0), 0: (4, 2.0), 8: (2, 1.0)}) == ((2.5 + 2) / 2, (3 + 1) / 2)
    assert Concept([[(0,), (1,)]]).measure({0: (5, 9.0), 1: (2, 1.0)}) == (2, 1.0)


def test_rank_comes_before_score():
    """A high score at a low rank does not come first."""
    figures = [(400, 11.0), (1, 5.0), (1, 6.0)]
    rows = [{"layer": 0, "index": i, "rank": rank, "score": score} for i, (rank, score) in enumerate(figures)]
    assert [row["index"] for row in sorted(rows, key=best_first)] == [2, 1, 0]


def test_file_that_is_not_a_map(tmp_path):
    """A DataError."""
    path = tmp_path / "map.parquet"
    path.write_text('{"layer": 1}\n')
    with pytest.raises(DataError, match="not a map"):
        open_map(path)


def test_interrupted_map_leaves_no_file(tmp_path, session, lens):
    """Maps are written atomically."""

    def broken():
        yield next(value_tokens(lens, session.ffns))
        raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError):
        write_map(tmp_path / "map.parquet", map_header(session.base, lens, 10), broken())
    assert list(tmp_path.iterdir()) == []


def test_map_of_another_model(tmp_path, session, lens):
    """Other sizes or another vocabulary of the same size are an error."""
    path, header = tmp_path / "map.parquet", map_header(session.base, lens, 3)
    write_map(path, header, value_tokens(lens, session.ffns, top_k=3))
    found = open_map(path)
    assert found.header == header
    found.check_base(session.base)
    session.base.tokenizer_hashes = {"vocabulary": "0"}
    with pytest.raises(ModelError, match="another vocabulary"):
        found.check_base(session.base)
    session.base.sizes = session.base.sizes | {"layers": 3}
    with pytest.raises(ModelError, match="layers 2, here 3"):
        found.check_base(session.base)
