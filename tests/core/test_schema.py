"""Files of JSON and YAML as typed records: what is read, and how an error says what is wrong."""

from __future__ import annotations

import ast
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from braces_cli.core.errors import ConfigError, DataError, ModelError
from braces_cli.core.schema import (
    Count,
    Kind,
    Malformed,
    Name,
    Size,
    decode,
    decode_yaml,
    parse,
    read,
    read_yaml,
    stored_form,
)

PACKAGE = Path(__file__).parents[2] / "braces_cli"
PARSERS = {"json.load", "json.loads", "yaml.load", "yaml.safe_load", "msgspec.convert"}
# The two boundaries, and a program that runs where braces cannot be imported.
ALLOWED = {
    "core/config.py",
    "core/schema.py",
    "export/verify_process.py",
    "core/files.py",
}


@dataclass
class Part:
    """Inside a list."""

    size: Size


@dataclass
class Example:
    """A file."""

    name: Name
    layers: list[Count]
    parts: list[Part] = field(default_factory=list)
    words: dict[str, float] = field(default_factory=dict)
    rate: float | None = None


EXAMPLE = Kind(Example, ModelError, "Make it again.", "example", closed=True)


def test_only_the_boundaries_parse() -> None:
    """Files of every kind go through them, rows too."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        calls = {ast.unparse(node.func) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)}
        found |= {str(path.relative_to(PACKAGE))} if calls & PARSERS else set()
    assert found <= ALLOWED


def test_a_good_file_is_read(tmp_path: Path) -> None:
    """A byte order mark in front, as editors on Windows write it, does no harm."""
    path = tmp_path / "a.json"
    path.write_bytes(b'\xef\xbb\xbf{"name": "x", "layers": [0, 2], "parts": [{"size": 1}], "rate": 1}')
    assert read(EXAMPLE, path) == Example("x", [0, 2], [Part(1)], {}, 1.0)


CASES = {
    "another type": ('{"name": 5, "layers": []}', "`name`: expected str, this is 5"),
    "a missing key": ('{"name": "x"}', "missing required field layers"),
    "a missing key inside": ('{"name": "x", "layers": [], "parts": [{}]}', "`parts[0]`: object missing"),
    "an unknown key": ('{"name": "x", "layer": []}', "unknown key `layer`"),
    "an item": ('{"name": "x", "layers": [0, "1"]}', '`layers[1]`: expected int, this is "1"'),
    "a range": ('{"name": "x", "layers": [-1]}', "`layers[0]`: expected int >= 0, this is -1"),
    "inside": ('{"name": "x", "layers": [], "parts": [{"size": 0}]}', "`parts[0].size`: expected int >= 1"),
    "in a mapping": ('{"name": "x", "layers": [], "words": {"a": "b"}}', "`words[...]`: expected float"),
    "one of two types": ('{"name": "x", "layers": [], "rate": []}', "`rate`: expected float | null"),
    "no object": ("[1]", "expected object, this is list of 1"),
    "a null character": ('{"name": "a\\u0000b", "layers": []}', "`name`: expected str matching"),
    "long text": (f'{{"name": "x", "layers": "{"x" * 5000}"}}', "xxx..."),
    "no JSON": ('{\n"name": 5', "broken JSON"),
    "nothing": (" ", "nothing in it"),
    "many digits": (f"[{'9' * 5000}]", "more than 4,300 digits"),
    "deeper than Python goes": ("[" * 200_000, "too deep"),
    "half a character": ('{"name": "\\ud800"}', "half a character"),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_wrong_is_said(name: str, tmp_path: Path) -> None:
    """In one short line, with the file."""
    text, message = CASES[name]
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ModelError) as caught:
        read(EXAMPLE, path)
    assert message in caught.value.message
    assert len(caught.value.message) < 200
    assert str(caught.value.where).startswith(str(path))
    assert str(caught.value.hint).endswith("Make it again.")


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    """Missing, a folder, a loop of links, a pipe that nobody writes to, a name that no file can have."""
    loop, pipe = tmp_path / "loop", tmp_path / "pipe"
    loop.symlink_to(loop)
    os.mkfifo(pipe)
    for path, message in (
        (tmp_path / "none", "no such example"),
        (tmp_path, "this is a folder, not a file"),
        (pipe, "this is a pipe or a device"),
        (loop, "."),
        (tmp_path / "a\0b", "."),
    ):
        with pytest.raises(ModelError, match=message):
            read(EXAMPLE, path)


def test_text_of_another_encoding_is_refused() -> None:
    """By the byte at fault."""
    with pytest.raises(DataError, match="not UTF-8 \\(byte 1\\)"):
        parse(Kind(object, DataError, ""), b'"\xff"', "a")


@pytest.mark.parametrize("value", [1, -1.5, "é😀", None, True, [1, [2, {"a": []}]], {"a": {"b": 10**30}}])
def test_json_is_read_as_it_was_written(value: Any) -> None:
    """Escaped or not."""
    assert decode(json.dumps(value)) == value
    assert decode(json.dumps(value, ensure_ascii=False)) == value


def test_the_stored_form_is_what_comes_back() -> None:
    """Tuples are lists and keys are text."""
    assert stored_form({"a": (1, 2), 3: None}) == {"a": [1, 2], "3": None}


def test_yaml_is_text_until_it_is_converted(tmp_path: Path) -> None:
    """Neither `off` nor a time nor a date is anything else than on the command line."""
    path = tmp_path / "a.yaml"
    path.write_text("a: 1\nb: [x, 2.5]\nc: off\nd: -4:4:1\nf: true\ng:\nh: ''\n")
    expected = {
        "a": "1",
        "b": ["x", "2.5"],
        "c": "off",
        "d": "-4:4:1",
        "f": "true",
        "g": None,
        "h": "",
    }
    assert read_yaml(path, "") == expected
    path.write_text("# nothing\n")
    assert read_yaml(path, "") == {}
    path.write_text("- a\n")
    with pytest.raises(ConfigError, match="expected object, this is list"):
        read_yaml(path, "")


BAD_YAML = {
    "a tag of Python": ("a: 1\nb: !!python/object/apply:os.system [true]", "not YAML", 2),
    "a tag of somebody": ("a: !own 1", "not YAML", 1),
    "an alias": ("a: &a [x]\nb: *a", "an alias", 2),
    "a circle": ("a: &a [*a]", "an alias", 1),
    "deeper than Python goes": ("[" * 5000, "deep", None),
    "a key twice": ("a: 1\nb: 2\na: 3", "`a` is named twice", 1),
    "a list as a key": ("? [a]\n: b", "unhashable key", 1),
    "torn": ("a: [", "not YAML", 1),
    "half a character": ('a: "\\ud800"', "half a character", None),
    "two documents": ("a: 1\n---\nb: 2", "not YAML", 2),
}


@pytest.mark.parametrize("name", BAD_YAML)
def test_bad_yaml_is_refused(name: str) -> None:
    """With the line."""
    text, message, line = BAD_YAML[name]
    with pytest.raises(Malformed) as caught:
        decode_yaml(text)
    assert message in caught.value.message
    assert caught.value.line == line
