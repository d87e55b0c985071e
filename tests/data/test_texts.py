"""Texts from plain files and data files."""

from __future__ import annotations

import json
import os

import pytest

from braces_cli.core.errors import DataError
from braces_cli.data.rows import read_texts


def test_lines_of_a_plain_file(tmp_path):
    """Blank lines are left out; a form feed does not end a text, and spaces around it stay."""
    path = tmp_path / "t.txt"
    path.write_text("one\n\n two words \na\fb\n")
    assert read_texts(path) == ["one", " two words ", "a\fb"]


def test_rows_of_a_data_file(tmp_path):
    """Of any format, prompt and completion as one text; or one field of each row."""
    path = tmp_path / "t.jsonl"
    rows = [{"prompt": "a ", "completion": "b"}, {"prompt": "c", "completion": "d"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_texts(path) == ["a b", "cd"]
    assert read_texts(path, field="prompt") == ["a ", "c"]
    with pytest.raises(DataError, match="no text in `text`"):
        read_texts(path, field="text")


@pytest.mark.parametrize(
    ("content", "message"), [(None, "no such file"), (b"\n \n", "all texts are blank"), (b"\xff\n", "not UTF-8")]
)
def test_files_without_texts(tmp_path, content, message):
    """A DataError that says what is wrong."""
    path = tmp_path / "t.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_texts(path)


def test_a_pipe_that_nobody_writes_to_is_refused(tmp_path):
    """Its reader would wait for ever."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="a pipe or a device"):
        read_texts(tmp_path / "pipe")
