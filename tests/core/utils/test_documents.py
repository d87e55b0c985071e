"""Files by the schema of their kind: the error names file, line, key, what is there and what belongs there."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from braces_cli.core.utils.documents import Count, Kind, Name, Size, line_of_setting, parse, read, stored_form
from braces_cli.core.utils.errors import ConfigError, DataError, ModelError


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


def test_a_good_file_is_read(tmp_path: Path) -> None:
    """A byte order mark in front, as editors on Windows write it, does no harm."""
    path = tmp_path / "a.json"
    path.write_bytes(b'\xef\xbb\xbf{"name": "x", "layers": [0, 2], "parts": [{"size": 1}], "rate": 1}')
    assert read(EXAMPLE, path) == Example("x", [0, 2], [Part(1)], {}, 1.0)


CASES = {
    "another type": ('{"name": 5, "layers": []}', "`name` is 5, expected text"),
    "a missing key": ('{"name": "x"}', "no key `layers`"),
    "a missing key inside": ('{"name": "x", "layers": [], "parts": [{}]}', "no key `parts[0].size`"),
    "an unknown key": ('{"name": "x", "layer": []}', "unknown key `layer`"),
    "an item": ('{"name": "x", "layers": [0, "1"]}', '`layers[1]` is "1", expected a whole number'),
    "a range": ('{"name": "x", "layers": [-1]}', "`layers[0]` is -1, expected a whole number >= 0"),
    "a truth value": ('{"name": "x", "layers": [true]}', "`layers[0]` is true, expected a whole number"),
    "a huge number": (f'{{"name": "x", "layers": [{"9" * 40}]}}', "a number of more than 18 digits"),
    "inside": ('{"name": "x", "layers": [], "parts": [{"size": 0}]}', "`parts[0].size` is 0"),
    "in a mapping": ('{"name": "x", "layers": [], "words": {"a": "b"}}', "`words[...]` expected a number"),
    "one of two types": ('{"name": "x", "layers": [], "rate": []}', "`rate` is [], expected a number or null"),
    "no object": ("[1]", "this is [1], expected an object"),
    "an empty name": ('{"name": "", "layers": []}', '`name` is "", expected'),
    "a null character": ('{"name": "a\\u0000b", "layers": []}', "`name` is"),
    "long text": (f'{{"name": ["{"x" * 5000}"], "layers": []}}', "xxx..."),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_wrong_is_said(name: str, tmp_path: Path) -> None:
    """In one short line."""
    text, message = CASES[name]
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ModelError) as caught:
        read(EXAMPLE, path)
    assert message in caught.value.message
    assert len(caught.value.message) < 200
    assert (caught.value.where, str(caught.value.hint)[-14:]) == (str(path), "Make it again.")


def test_lines_are_named_where_they_are_known(tmp_path: Path) -> None:
    """Of broken text, and of a key that stands there once."""
    path = tmp_path / "a.json"
    for text, line in (('{\n"name": 5,\n"layers": []}', 2), ('{\n"name": "x",\n', 3)):
        path.write_text(text)
        with pytest.raises(ModelError) as caught:
            read(EXAMPLE, path)
        assert caught.value.where == f"{path}:{line}"
    path.write_text("a: 1\nrank: 2\n")
    assert line_of_setting(path, "rank") == f"{path}:2"


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    """Missing, a folder, a loop of links, a pipe that nobody writes to, a name that no file can have."""
    import os

    loop, pipe = tmp_path / "loop", tmp_path / "pipe"
    loop.symlink_to(loop)
    os.mkfifo(pipe)
    for path, message in (
        (tmp_path / "none", "no such example"),
        (tmp_path, "this is a folder, not a file"),
        (pipe, "this is a pipe or a device"),
        (loop, "."),
        (tmp_path / "a\0b", "."),
        (tmp_path / ("x" * 300), "."),
    ):
        with pytest.raises(ModelError, match=message):
            read(EXAMPLE, path)


def test_text_of_another_encoding_is_refused() -> None:
    """By the byte at fault."""
    with pytest.raises(DataError, match="not UTF-8 \\(byte 1\\)"):
        parse(Kind(object, DataError, ""), b'"\xff"', "a")


def test_a_kind_has_its_class_of_errors() -> None:
    """And its syntax."""
    with pytest.raises(ConfigError, match="not YAML") as caught:
        parse(Kind(object, ConfigError, "", syntax="yaml"), "a: 1\nb: [", "a.yaml")
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("value", [{"a": (1, 2), 3: None}, [float("inf")]])
def test_the_stored_form_is_what_comes_back(value: Any) -> None:
    """Tuples are lists and keys are text."""
    expected = {"a": [1, 2], "3": None} if isinstance(value, dict) else value
    assert stored_form(value) == expected
