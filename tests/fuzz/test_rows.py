"""Rows and prompts: any file is rows with keys, or a DataError with its place, and nothing else."""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hypothesis import strategies as st

from braces_cli.core.errors import BracesError, DataError
from braces_cli.data.rows import CHAT, Source, parts, read_format, read_rows
from braces_cli.steering.prompts import read_prompts
from tests.fuzz.budget import attempt, fuzz
from tests.fuzz.inputs import HALF, JSON_TEXT, PLAIN, VALUES, WORDS, as_bytes

LINES = st.lists(st.one_of(st.dictionaries(WORDS, VALUES, max_size=3).map(json.dumps), JSON_TEXT), max_size=4)
CELLS = st.lists(st.lists(st.one_of(PLAIN, st.sampled_from(['"', '"a', "a\x00b", "1", ""])), max_size=4), max_size=5)
TABLES = st.tuples(CELLS, st.sampled_from([",", "\t", ";"])).map(lambda t: "\n".join(t[1].join(row) for row in t[0]))
FILES = st.one_of(
    st.tuples(st.sampled_from([".jsonl", ".json"]), as_bytes(LINES.map("\n".join))),
    st.tuples(st.just(".json"), as_bytes(st.lists(VALUES, max_size=4).map(json.dumps))),
    st.tuples(st.sampled_from([".csv", ".tsv"]), as_bytes(TABLES)),
    st.tuples(st.just(".txt"), as_bytes(PLAIN)),
    st.tuples(st.sampled_from([".parquet", "", ".bin"]), st.binary(max_size=60)),
)


@contextmanager
def stored(content: bytes, name: str) -> Iterator[Path]:
    """A file of this content, which is gone behind the block."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        yield path


@fuzz(
    FILES,
    examples=(
        ((".jsonl", b'{"text": ' + b"[" * 100_000 + b"}"),), ((".json", b'[{"text": ' + b"9" * 5000 + b"}]"),),
        ((".csv", b'text\n"a'),), ((".csv", b"text\na\x00b\n"),), ((".jsonl", b'{"text": "\\ud800"}'),),
        ((".csv", b"text\n" + b"x" * 200_000),), ((".jsonl", b"\xef\xbb\xbf{}"),), ((".json", b"[1, 2]"),),
        ((".parquet", b"PAR1\x00PAR1"),),
    ),
)  # fmt: skip
def test_a_file_is_rows_or_a_data_error(file: tuple[str, bytes]) -> None:
    suffix, content = file
    with stored(content, f"rows{suffix}") as path:
        rows, error = attempt(lambda: list(read_rows(str(path))), DataError)
        if error:
            assert str(path) in error.where
            assert error.message
            assert error.hint
            return
    assert rows
    for row in rows:
        assert isinstance(row, Source)
        assert all(isinstance(key, str) for key in row.fields)
        read_fields(row)


def read_fields(row: Source) -> None:
    """A row is of one format, whose values are text, or the error names the row."""
    found, error = attempt(lambda: read_format(row, {}), BracesError)
    if found and found[0] is not CHAT:
        texts, error = attempt(lambda: parts(*found, row.where), BracesError)
        assert error or [isinstance(texts[0], str), isinstance(texts[1], str | None)] == [True, True]
    assert error is None or row.where in error.where


@fuzz(
    st.booleans(),
    as_bytes(LINES.map("\n".join)),
    examples=((True, b'{"prompt": {"text": 5}}'), (True, b'{"prompt": "\\ud800"}'), (False, b"\x00\n"), (True, b"[]")),
)
def test_prompts_are_text_or_a_data_error(structured: bool, content: bytes) -> None:
    with stored(content, "prompts.jsonl" if structured else "prompts.txt") as path:
        prompts, error = attempt(lambda: list(read_prompts([], path, io.StringIO())), DataError)
    if error:
        assert str(path) in error.where
        return
    assert prompts
    for prompt in prompts:
        assert prompt.strip()
        assert HALF not in prompt
        prompt.encode()
