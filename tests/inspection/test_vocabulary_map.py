"""Maps on disk: they say what the model says, and belong to one model."""

from __future__ import annotations

import pytest

from braces_cli.core.errors import ConfigError, DataError, ModelError
from braces_cli.inspection.maps import check_model, open_map, search, splitter, write_map
from braces_cli.inspection.search import model_concept, top_vectors_for_concept
from braces_cli.inspection.vocabulary import map_header, value_tokens


def test_a_map_says_what_the_model_says(session, tmp_path):
    """Whatever vectors it lists, in the same order with the same figures."""
    path = tmp_path / "map.parquet"
    header = map_header(session, "value", 20)
    assert write_map(path, header, value_tokens(session, top_k=20)) == 2 * 52
    found = open_map(path)
    assert found.header == header
    assert found.vectors() == 104
    expected = model_concept(session, [" film"])
    rows = search(found, expected, 8)
    direct = top_vectors_for_concept(session, expected, limit=8, top_k=20)
    assert rows
    assert all(row["rank"] <= 20 for row in rows)
    for row, other in zip(rows, direct, strict=False):
        assert (row["layer"], row["index"], row["rank"]) == (other["layer"], other["index"], other["rank"])
        assert [t["id"] for t in row["tokens"]] == [t["id"] for t in other["tokens"]]
        assert [t["token"] for t in row["tokens"]] == [t["token"] for t in other["tokens"]]
        assert row["score"] == pytest.approx(other["score"], rel=1e-5)
    assert {row["layer"] for row in search(found, expected, 100, [1])} == {1}


def test_a_file_that_is_no_map(tmp_path):
    """Exit code 3 and what writes one."""
    path = tmp_path / "map.parquet"
    path.write_text('{"layer": 1}\n')
    with pytest.raises(DataError, match="not a map"):
        open_map(path)


def test_a_map_that_breaks_off_is_not_left_behind(tmp_path, session):
    """Whole or not at all."""

    def broken():
        yield next(value_tokens(session))
        raise RuntimeError("the machine went down")

    with pytest.raises(RuntimeError):
        write_map(tmp_path / "map.parquet", map_header(session, "value", 10), broken())
    assert list(tmp_path.iterdir()) == []


def test_a_map_of_another_model_is_refused(tmp_path, session):
    """Same sizes, other weights; same weights, other vocabulary."""
    path = tmp_path / "map.parquet"
    header = map_header(session, "value", 3)
    write_map(path, header, value_tokens(session, top_k=3))
    found, own = open_map(path), session.base.fingerprint(session.ffns)
    check_model(found, own, header["tokenizer"])
    with pytest.raises(ModelError, match="other weights"):
        check_model(found, own | {"sha256": "0"})
    with pytest.raises(ModelError, match="another vocabulary"):
        check_model(found, own, {"vocabulary": "0"})


def test_a_map_splits_words_as_its_model_does(tmp_path, session):
    """By the tokenizer in the model's folder; without it, an error with the way out."""
    from braces_cli.core.models.tokenize import encode_word

    path = tmp_path / "map.parquet"
    header = map_header(session, "value", 3)
    write_map(path, header, value_tokens(session, top_k=3))
    assert splitter(open_map(path))("badness") == encode_word(session.base.tokenizer, "badness")
    write_map(path, header | {"model": "gone/away"}, [])
    with pytest.raises(ConfigError, match="no single token"):
        splitter(open_map(path))("badness")
