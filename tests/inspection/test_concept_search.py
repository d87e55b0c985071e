"""Finding vectors: what counts as a concept, maps on disk, and that a map says what the model says."""

from __future__ import annotations

import json
import math

import pytest
import torch

from braces_cli.core.method.adapter_files import find_adapter
from braces_cli.core.utils.errors import ConfigError, DataError, ModelError
from braces_cli.inspection.concept_search import (
    attribute_relevance,
    model_concept,
    top_vectors_for_attribute,
    top_vectors_for_concept,
)
from braces_cli.inspection.concept_tokens import Concept, Vocabulary, best_first, concept
from braces_cli.inspection.vector_tokens import map_header, value_tokens
from braces_cli.inspection.vocabulary_map import check_model, open_map, search, splitter, write_map

WORDS = Vocabulary(["happy", " happy", "Happy", " Happy", "un", " un", "�", "�", "king"])


def never(word):
    pytest.fail(f"asked to split {word}")


def test_a_word_counts_in_each_spelling_that_is_one_token():
    """With and without space, and capitalised."""
    assert concept(["happy"], WORDS, never).tokens == [0, 1, 2, 3]
    assert concept(["Happy"], WORDS, never).tokens == [2, 3]
    assert concept([" happy"], WORDS, never).tokens == [1]
    assert concept(["id:6"], WORDS, never).tokens == [6]


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


def test_promoting_vectors_are_those_of_a_direct_computation(session):
    """Rank and score of every vector, sorted."""
    model = session.base.model
    wanted = model_concept(session, [" film"])
    (token,) = wanted.tokens
    rows = []
    for number, layer in enumerate(model.model.layers):
        scores = model.lm_head(model.model.norm(layer.mlp.down_proj.weight.T)).detach()
        for index, row in enumerate(scores):
            rows.append(
                {"layer": number, "index": index, "rank": int((row > row[token]).sum()) + 1, "score": float(row[token])}
            )
    expected = sorted(rows, key=best_first)[:6]
    found = top_vectors_for_concept(session, wanted, limit=6, top_k=3)
    assert [(r["layer"], r["index"], r["rank"]) for r in found] == [
        (r["layer"], r["index"], r["rank"]) for r in expected
    ]
    assert [r["score"] for r in found] == pytest.approx([r["score"] for r in expected], rel=1e-5)
    assert all(len(r["tokens"]) == 3 for r in found)


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_a_map_says_what_the_model_says(session, tmp_path, suffix):
    """Whatever vectors it lists, in the same order with the same figures."""
    path = tmp_path / f"map{suffix}"
    header = map_header(session, "value", 20)
    assert write_map(path, header, value_tokens(session, top_k=20)) == 2 * 52
    found = open_map(path)
    assert found.header == header
    assert found.vectors() == 104
    wanted = model_concept(session, [" film"])
    rows = search(found, wanted, 8)
    direct = top_vectors_for_concept(session, wanted, limit=8, top_k=20)
    assert rows
    assert all(row["rank"] <= 20 for row in rows)
    for row, other in zip(rows, direct, strict=False):
        assert (row["layer"], row["index"], row["rank"]) == (other["layer"], other["index"], other["rank"])
        assert [t["id"] for t in row["tokens"]] == [t["id"] for t in other["tokens"]]
        assert [t["token"] for t in row["tokens"]] == [t["token"] for t in other["tokens"]]
        assert row["score"] == pytest.approx(other["score"], rel=1e-5)
    assert {row["layer"] for row in search(found, wanted, 100, [1])} == {1}


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_a_file_that_is_no_map(tmp_path, suffix):
    """Exit code 3 and what writes one."""
    path = tmp_path / f"map{suffix}"
    path.write_text('{"layer": 1}\n')
    with pytest.raises(DataError, match="not a map"):
        open_map(path)


def test_a_map_that_breaks_off_is_not_left_behind(tmp_path, session):
    """Whole or not at all."""

    def broken():
        yield next(value_tokens(session))
        raise RuntimeError("the machine went down")

    with pytest.raises(RuntimeError):
        write_map(tmp_path / "map.jsonl", map_header(session, "value", 10), broken())
    assert list(tmp_path.iterdir()) == []


def test_a_map_of_another_model_is_refused(tmp_path, session):
    """Same sizes, other weights; same weights, other vocabulary."""
    path = tmp_path / "map.jsonl"
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
    from braces_cli.core.models.tokenization import encode_word

    path = tmp_path / "map.jsonl"
    header = map_header(session, "value", 3)
    write_map(path, header, value_tokens(session, top_k=3))
    assert splitter(open_map(path))("badness") == encode_word(session.base.tokenizer, "badness")
    lines = path.read_text().splitlines()
    path.write_text("\n".join([json.dumps({"map": header | {"model": "gone/away"}}), *lines[1:]]) + "\n")
    with pytest.raises(ConfigError, match="no single token"):
        splitter(open_map(path))("badness")


def test_relevance_of_an_attribute_is_the_formula_of_the_paper(session, adapter_dir):
    """r_c = (R W_V)^T (R h_c) / sqrt(d_r), written out."""
    from braces_cli.core.attributes.attribute import find_attribute
    from braces_cli.core.method.reference import relevance_ref

    session.add_adapter(find_adapter(str(adapter_dir)))
    attribute = find_attribute(session, "positive", None)
    everything = []
    for row, (ffn, brace) in enumerate(session.adapter.sites):
        expected = relevance_ref(attribute.state[row], ffn.value_matrix(), brace.materialise())
        assert torch.allclose(attribute_relevance(session, attribute, ffn), expected, rtol=1e-4, atol=1e-6)
        everything += [(float(score), ffn.layer, index) for index, score in enumerate(expected)]
    best = sorted(everything, reverse=True)[:4]
    assert [(r["layer"], r["index"]) for r in top_vectors_for_attribute(session, attribute, limit=4)] == [
        b[1:] for b in best
    ]


def test_without_an_adapter_relevance_sums_to_what_steering_adds(session):
    """sum_j r_cj v_j is the vector that steering from a word list adds."""
    from braces_cli.core.attributes.attribute import PUSH, find_attribute

    attribute = find_attribute(session, "positive", None)
    for row, ffn in enumerate(session.ffns):
        moved = ffn.value_matrix().detach() @ attribute_relevance(session, attribute, ffn)
        expected = float(attribute.scale[row]) * attribute.state[row]
        assert torch.allclose(moved, expected, rtol=1e-4, atol=1e-5)
        assert math.isclose(float(moved.norm()), PUSH * float(attribute.residual[row]), rel_tol=1e-3)
