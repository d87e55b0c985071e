"""Examples in memory and as a stream, conditions of rows, and the statistics of `--check`."""

from itertools import islice

import pytest

from braces_cli.core.errors import DataError
from braces_cli.core.models.tokenize import IGNORED
from braces_cli.data import dataset as module
from braces_cli.data.dataset import Fields, Reading, Stream, check_rows, condition, read_examples
from braces_cli.data.rows import Source
from tests.conftest import tiny_tokenizer, write_rows


def write(path, rows):
    return str(write_rows(path, rows))


@pytest.fixture
def rows(tmp_path):
    """21 rows in two files; one has no scored token."""
    one = [{"text": "a" * n, "mood": "positive" if n % 2 else None} for n in range(1, 13)]
    other = [{"prompt": "the", "completion": " film" * n, "mood": "negative"} for n in range(9)]
    return [write(tmp_path / "one.jsonl", one), write(tmp_path / "other.jsonl", other)]


def drawn(rows, number, seed=0, how=None):
    stream = Stream(rows, how or Reading(tiny_tokenizer(), 64), seed, global_batch=8)
    return [None if example is None else tuple(example.tokens.ids) for example in islice(stream, number)]


def test_stream_has_the_examples_of_a_set_in_memory(rows, monkeypatch):
    """Another order in each pass, the same for the same seed, with a buffer smaller than the set."""
    monkeypatch.setattr(module, "BUFFER", 5)
    whole = sorted(tuple(item.ids) for item in read_examples(rows, Reading(tiny_tokenizer(), 64)).items)
    first, second = drawn(rows, 24), drawn(rows, 48)[24:]
    assert first[20:] == [None] * 4  # the last global batch is filled up
    assert sorted(first[:20]) == sorted(second[:20]) == whole
    assert first != second
    assert first == drawn(rows, 24)
    assert first != drawn(rows, 24, seed=1)


def test_stream_reads_rows_when_needed(tmp_path, monkeypatch):
    """An error far behind the buffer is raised only there."""
    monkeypatch.setattr(module, "BUFFER", 5)
    path = write(tmp_path / "a.jsonl", [{"text": "a film"}] * (module.HEAD + 50))
    with open(path, "a") as file:
        file.write("{broken\n")
    stream = iter(Stream([path], Reading(tiny_tokenizer(), 64), 0, 8))
    assert len(list(islice(stream, module.HEAD + 40))) == module.HEAD + 40
    with pytest.raises(DataError, match="broken JSON") as caught:
        list(islice(stream, 20))
    assert caught.value.where == f"{path}:{module.HEAD + 51}"


def test_stream_counts_rows_and_lists_attributes(rows):
    stream = Stream(rows, Reading(tiny_tokenizer(), 8, Fields("mood")), 0, 1)
    assert {found.attribute for found in stream.conditions} == {"positive", "negative", None}
    list(islice(stream, 20))
    assert (stream.counts.rows, stream.counts.dropped, stream.counts.truncated) == (21, 1, 9)


def test_check_rows(rows):
    """The numbers add up, and shown examples have their original text."""
    found = check_rows(rows, Reading(tiny_tokenizer(), 8, Fields("mood")))
    assert (found["rows"], found["examples"], found["dropped"], found["truncated"]) == (21, 20, 1, 9)
    assert found["formats"] == {"text": 12, "prompt/completion": 9}
    assert found["attributes"] == {"positive": 6, "neutral": 6, "negative": 9}
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


def test_rows_without_a_scored_token_are_dropped_and_counted(tmp_path):
    """An empty completion, and a prompt of the maximum length."""
    rows = [
        {"prompt": "the film", "completion": ""},
        {"prompt": "the film is good and the end is sad", "completion": " x"},
        {"prompt": "a", "completion": " good"},
    ]
    found = read_examples([write(tmp_path / "a.jsonl", rows)], Reading(tiny_tokenizer(), max_length=8))
    counts = found.counts
    assert (counts.rows, counts.dropped, counts.truncated, len(found.items)) == (3, 2, 1, 1)
    assert found.items[0].labels[0] == IGNORED


def test_a_chat_can_be_several_examples_of_one_row(tmp_path):
    """One per turn, for a template that changes earlier turns; all with the condition of the row."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{% endfor %}{{ '' if add_generation_prompt else '.' }}"
    )
    turns = [{"from": role, "value": "a"} for role in ("human", "gpt") * 2]
    rows = [{"conversations": turns, "mood": "positive"}, {"conversations": turns[:2], "mood": None}]
    path, how = write(tmp_path / "a.jsonl", rows), Reading(tokenizer, 64, Fields("mood"))
    found = check_rows([path], how)
    assert (found["rows"], found["examples"], found["dropped"], found["formats"]) == (2, 3, 0, {"conversations": 2})
    assert found["attributes"] == {"positive": 1, "neutral": 1}
    read_as = {f"role `{old}` read as `{new}`": 2 for old, new in (("gpt", "assistant"), ("human", "user"))}
    assert found["notes"] == {"one example per assistant turn: the chat template changes earlier turns": 1, **read_as}
    examples = read_examples([path], how)
    assert [each.attribute for each in examples.conditions] == ["positive", "positive", None]
    assert examples.counts.chat


def test_missing_cells_of_csv_are_dropped(tmp_path):
    """Blank cells and the usual words for missing values; in JSON the same letters are text."""
    path = tmp_path / "rows.csv"
    path.write_text("prompt,completion\na,good\nb,\nc,NaN\nNA,fine\ne,null\nf,Nancy\n")
    counts = read_examples([str(path)], Reading(tiny_tokenizer(), 64)).counts
    assert (counts.rows, counts.dropped) == (6, 4)
    assert counts.dropped_at == [f"{path}:{line}" for line in (3, 4, 5, 6)]
    lines = write(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "NaN"}])
    assert read_examples([lines], Reading(tiny_tokenizer(), 64)).counts.dropped == 0


def test_no_scored_rows(tmp_path):
    """In memory, and as a stream before a model is loaded."""
    paths, how = [write(tmp_path / "a.jsonl", [{"text": ""}, {"text": "  "}])], Reading(tiny_tokenizer(), 16)
    for read in (read_examples, lambda paths, how: Stream(paths, how, 0, 8)):
        with pytest.raises(DataError, match=r"no row has a token to score \(2 read\)"):
            read(paths, how)


FIELDS = Fields("mood", "how")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"mood": "positive", "how": 3}, ("positive", 3.0)),
        ({"mood": " positive ", "how": "-1.5"}, ("positive", -1.5)),
        ({"mood": "positive"}, ("positive", 1.0)),
        ({"mood": "positive", "how": None}, ("positive", 1.0)),
        ({"mood": "neutral", "how": 3}, (None, 0.0)),
        ({"mood": "", "how": 3}, (None, 0.0)),
        ({"mood": None}, (None, 0.0)),
    ],
)
def test_condition_of_a_row(fields, expected):
    """neutral, empty and null are strength 0; a missing strength is 1. In CSV words for no value are missing, too."""
    words = {key: value for key, value in fields.items() if value is not None}
    for untyped, values in ((False, fields), (True, {"how": " ", "mood": "NaN"} | words)):
        if not untyped or all(isinstance(value, str) for value in values.values()):
            found = condition(Source(values, "a:1", untyped), FIELDS)
            assert (found.attribute, found.strength) == expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text": "x"}, "has no `mood`"),
        ({"mood": 3}, "must be a name"),
        ({"mood": "positive", "how": "much"}, "must be a number"),
        ({"mood": "positive", "how": float("nan")}, "must be a number"),
    ],
)
def test_invalid_conditions(fields, message):
    """DataError with the location."""
    with pytest.raises(DataError, match=message) as caught:
        condition(Source(fields, "a.jsonl:4"), FIELDS)
    assert caught.value.where == "a.jsonl:4"
