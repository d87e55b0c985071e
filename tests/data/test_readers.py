"""Rows from every kind of file, and faults by file and line."""

from __future__ import annotations

import json

import pytest

from braces_cli.core.errors import DataError
from braces_cli.core.models.tokenize import IGNORED
from braces_cli.data.dataset import Reading, read_examples
from braces_cli.data.rows import read_rows
from tests.conftest import tiny_tokenizer

ROWS = [{"prompt": "the film", "completion": " is good"}, {"prompt": "a, day", "completion": ' is "sad"\nbad'}]


def write(path, rows):
    import csv

    import pyarrow
    import pyarrow.parquet

    if path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".parquet"])
def test_every_format_gives_the_same_rows(tmp_path, suffix):
    """Commas, quotes and line breaks inside a value survive."""
    path = write(tmp_path / f"rows{suffix}", ROWS)
    assert [row.fields for row in read_rows(str(path))] == ROWS


@pytest.mark.parametrize(
    ("name", "content", "message", "place"),
    [
        ("a.jsonl", '{"text": "x"}\n{"text": \n', "broken JSON", ":2"),
        ("a.jsonl", '{"text": "x"}\n["y"]\n', "must be an object", ":2"),
        ("a.jsonl", "", "the file is empty", ""),
        ("a.jsonl", "\n \n", "no rows", ""),
        ("a.json", '[{"text": "x"},\n\n {"text" "y"}]', "broken JSON", ":3"),
        ("a.json", '["x"]', "must be an object", ", row 1"),
        ("a.json", '{"text": "x"}\n{"text": \n', "broken JSON", ":2"),
        ("a.csv", "prompt,completion\na,b\nc\n", "another number of cells", ":3"),
        ("a.csv", "prompt,completion\na,b,c\n", "another number of cells", ":2"),
        ("a.docx", "hello", "cannot read `.docx` files", ""),
        ("a.parquet", "hello", "broken Parquet", ""),
    ],
)
def test_a_fault_is_named_by_its_place(tmp_path, name, content, message, place):
    """File and line, where the format has lines."""
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        list(read_rows(str(path)))
    assert caught.value.where == f"{path}{place}"


def test_not_utf8(tmp_path):
    """No traceback of the decoder."""
    path = tmp_path / "a.jsonl"
    path.write_bytes('{"text": "é"}'.encode("latin-1"))
    with pytest.raises(DataError, match="not UTF-8"):
        list(read_rows(str(path)))


def test_missing_files_and_folders(tmp_path):
    """Each says what it is."""
    with pytest.raises(DataError, match="no such file"):
        read_rows(str(tmp_path / "none.jsonl"))
    with pytest.raises(DataError, match="a folder, not a file"):
        read_rows(str(tmp_path))


def test_a_hub_set_out_of_reach_says_so():
    """Offline, an id that looks like the hub's is no bare traceback."""
    with pytest.raises(DataError, match="hub cannot be reached for the data set"):
        list(read_rows("someone/nothing:train"))


def test_rows_without_a_scored_token_are_dropped_and_counted(tmp_path):
    """An empty completion, and a prompt that fills the whole length, teach nothing."""
    rows = [
        {"prompt": "the film", "completion": ""},
        {"prompt": "the film is good and the end is sad", "completion": " x"},
        {"prompt": "a", "completion": " good"},
    ]
    found = read_examples([str(write(tmp_path / "a.jsonl", rows))], Reading(tiny_tokenizer(), max_length=8))
    assert (found.rows, found.dropped, found.truncated, len(found.items)) == (3, 2, 1, 1)
    assert found.items[0].labels[0] == IGNORED


def test_nothing_left_is_an_error(tmp_path):
    """Exit code 3, before a model is loaded."""
    path = write(tmp_path / "a.jsonl", [{"text": ""}, {"text": "  "}])
    with pytest.raises(DataError, match=r"no row has a token to score \(2 read\)"):
        read_examples([str(path)], Reading(tiny_tokenizer(), 16))
