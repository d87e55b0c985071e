"""Which columns mean what: by their keys, by `--columns`, and what is refused rather than guessed."""

from __future__ import annotations

import pytest

from braces_cli.core.errors import ConfigError, DataError
from braces_cli.data.rows import FormatReader, Source, parse_columns, parts


def read(fields, columns=()):
    kind, values = FormatReader(parse_columns(columns).content).read(Source(fields, "a.jsonl:7"))
    return parts(kind, values, "a.jsonl:7")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"text": "x", "label": 1}, ("x", None)),
        ({"prompt": "p", "completion": "c"}, ("p", "c")),
        ({"instruction": "do", "input": "", "output": "done"}, ("### Instruction:\ndo\n\n### Response:\n", "done")),
        ({"instruction": "do", "output": "done", "answer": "d"}, ("### Instruction:\ndo\n\n### Response:\n", "done")),
        (
            {"instruction": "do", "input": "this", "output": "done"},
            ("### Instruction:\ndo\n\n### Input:\nthis\n\n### Response:\n", "done"),
        ),
        # Columnar files give every row every column.
        ({"text": None, "prompt": "p", "completion": "c", "messages": None}, ("p", "c")),
    ],
)
def test_what_a_row_means_is_told_by_its_keys(fields, expected):
    """`text` whole; of the pairs only the second part is scored."""
    assert read(fields) == expected


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (["prompt=question,completion=answer"], ("q", "a")),
        (["prompt=question", "completion=answer"], ("q", "a")),
        (["text=answer"], ("a", None)),
        (["instruction=question,output=answer"], ("### Instruction:\nq\n\n### Response:\n", "a")),
        (["instruction=question,input=text,output=answer"], read({"instruction": "q", "input": "t", "output": "a"})),
    ],
)
def test_columns_say_what_keys_do_not(columns, expected):
    """And they beat the keys: `text` is there, but not meant."""
    assert read({"question": "q", "answer": "a", "text": "t"}, columns) == expected


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("prompt", "is not KEY=COLUMN"),
        ("prompt=", "is not KEY=COLUMN"),
        ("promt=question,completion=answer", "no format has a key `promt`"),
        ("prompt=a,prompt=b", "named twice"),
        ("prompt=question", "prompt is not a complete format"),
        ("prompt=a,completion=b,text=c", "is not a complete format"),
    ],
)
def test_columns_that_say_nothing_are_usage(value, message):
    """Before any file is opened."""
    with pytest.raises(ConfigError, match=message):
        parse_columns([value])


@pytest.mark.parametrize(
    ("fields", "columns", "message"),
    [
        ({"question": "x", "answer": "y"}, [], "none of the needed fields .keys found: question, answer."),
        ({"text": 3}, [], "`text` must be text, not int"),
        ({"text": None}, [], "`text` must be text, not NoneType"),
        ({"prompt": "p", "completion": None}, [], "`completion` must be text, not NoneType"),
        ({"text": "x", "prompt": "p", "completion": "c"}, [], "fit 2 formats: text, prompt/completion"),
        ({"question": "x"}, ["text=answer"], "no column `answer` .keys found: question."),
    ],
)
def test_a_row_that_is_not_clear_names_its_place(fields, columns, message):
    """No guess, whatever a guess would be."""
    with pytest.raises(DataError, match=message) as caught:
        read(fields, columns)
    assert caught.value.where == "a.jsonl:7"


def test_rows_of_one_file_have_one_format():
    """A row that differs is named."""
    reader = FormatReader()
    reader.read(Source({"text": "x"}, "a.jsonl:1"))
    with pytest.raises(DataError, match=r"this row is prompt/completion, those before it are text") as caught:
        reader.read(Source({"prompt": "p", "completion": "c"}, "a.jsonl:2"))
    assert caught.value.where == "a.jsonl:2"


def test_attribute_and_strength_are_columns_too():
    """On any format."""
    found = parse_columns(["text=review,attribute=mood", "strength=how"])
    assert (found.content, found.attribute, found.strength) == ({"text": "review"}, "mood", "how")
