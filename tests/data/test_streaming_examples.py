"""Sets larger than memory, and what `--check` says about any set."""

from __future__ import annotations

import json
from itertools import islice

import pytest

from braces_cli.core.errors import DataError
from braces_cli.data import dataset as module
from braces_cli.data.dataset import Fields, Reading, Stream, check_rows, read_examples
from tests.conftest import tiny_tokenizer


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def rows(tmp_path):
    """21 rows of two files; one has nothing to score."""
    one = [{"text": "a" * n, "mood": "positive" if n % 2 else None} for n in range(1, 13)]
    other = [{"prompt": "the", "completion": " film" * n, "mood": "negative"} for n in range(9)]
    return [write(tmp_path / "one.jsonl", one), write(tmp_path / "other.jsonl", other)]


def drawn(rows, number, seed=0, how=None):
    stream = Stream(rows, how or Reading(tiny_tokenizer(), 64), seed, global_batch=8)
    return [None if example is None else tuple(example.tokens.ids) for example in islice(stream, number)]


def test_a_stream_holds_what_a_set_in_memory_holds(rows, monkeypatch):
    """Pass after pass, in another order each, with a buffer far smaller than the set; the same for the same seed."""
    monkeypatch.setattr(module, "BUFFER", 5)
    whole = sorted(tuple(item.ids) for item in read_examples(rows, Reading(tiny_tokenizer(), 64)).items)
    first, second = drawn(rows, 24), drawn(rows, 48)[24:]
    assert first[20:] == [None] * 4  # the last global batch is filled up
    assert sorted(first[:20]) == sorted(second[:20]) == whole
    assert first != second
    assert first == drawn(rows, 24)
    assert first != drawn(rows, 24, seed=1)


def test_a_stream_keeps_no_more_than_its_buffer(tmp_path, monkeypatch):
    """Rows are read when they are needed: a fault far behind shows only there."""
    monkeypatch.setattr(module, "BUFFER", 5)
    path = write(tmp_path / "a.jsonl", [{"text": "a film"}] * (module.HEAD + 50))
    with open(path, "a") as file:
        file.write("{broken\n")
    stream = iter(Stream([path], Reading(tiny_tokenizer(), 64), 0, 8))
    assert len(list(islice(stream, module.HEAD + 40))) == module.HEAD + 40
    with pytest.raises(DataError, match="broken JSON") as caught:
        list(islice(stream, 20))
    assert caught.value.where == f"{path}:{module.HEAD + 51}"


def test_a_stream_counts_and_knows_its_attributes(rows):
    """Before training: the attributes; while it goes on: rows, and what became of them."""
    stream = Stream(rows, Reading(tiny_tokenizer(), 8, Fields("mood")), 0, 1)
    assert {found.attribute for found in stream.conditions} == {"positive", "negative", None}
    list(islice(stream, 20))
    assert (stream.rows, stream.dropped, stream.truncated) == (21, 1, 9)


def test_an_empty_stream_is_bad_data_at_once(tmp_path):
    """Before a model is loaded."""
    with pytest.raises(DataError, match=r"no row has a token to score \(2 read\)"):
        Stream([write(tmp_path / "a.jsonl", [{"text": ""}] * 2)], Reading(tiny_tokenizer(), 64), 0, 8)


def test_check_counts_everything_and_shows_two(rows):
    """The numbers add up, and a shown example reads as it was written."""
    found = check_rows(rows, Reading(tiny_tokenizer(), 8, Fields("mood")))
    assert (found["rows"], found["examples"], found["dropped"], found["truncated"]) == (21, 20, 1, 9)
    assert found["formats"] == {"text": 12, "prompt/completion": 9}
    assert found["attributes"] == {"positive": 6, "neutral": 6, "negative": 9}
    assert sum(bar["examples"] for bar in found["histogram"]) == 20
    items = read_examples(rows, Reading(tiny_tokenizer(), 8)).items
    lengths = sorted(len(item.ids) for item in items)
    assert found["tokens"] == sum(lengths)
    assert found["scored_tokens"] == sum(item.scored for item in items)
    assert found["lengths"] == {"least": lengths[0], "median": lengths[9], "mean": sum(lengths) / 20, "most": 8}
    assert found["shown"][0] == {
        "where": f"{rows[0]}:1",
        "parts": [{"text": "<s>", "scored": False}, {"text": "a</s>", "scored": True}],
    }
    assert len(found["shown"]) == 2
