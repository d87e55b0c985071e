"""JSON and YAML files as typed records, and the errors of invalid files."""

import ast
import os
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from braces_cli.core.errors import ConfigError, DataError, ModelError
from braces_cli.core.schema import Count, Kind, Malformed, Name, Size, decode_yaml, parse, read, read_yaml

PACKAGE = Path(__file__).parents[2] / "braces_cli"
PARSERS = {"json.load", "json.loads", "yaml.load", "yaml.safe_load", "msgspec.convert"}
# The boundaries, and the program that cannot import braces.
ALLOWED = {"core/config.py", "core/schema.py", "export/verify_process.py", "core/files.py"}


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
    """Rows of data files too."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        calls = {ast.unparse(node.func) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)}
        found |= {str(path.relative_to(PACKAGE))} if calls & PARSERS else set()
    assert found <= ALLOWED


def test_a_valid_file_is_read(tmp_path: Path) -> None:
    """With a byte order mark, as editors on Windows write it."""
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
    "not an object": ("[1]", "expected object, this is list of 1"),
    "a null character": ('{"name": "a\\u0000b", "layers": []}', "`name`: expected str matching"),
    "long text": (f'{{"name": "x", "layers": "{"x" * 5000}"}}', "xxx..."),
    "not JSON": ('{\n"name": 5', "broken JSON"),
    "an empty file": (" ", "the text is empty"),
    "many digits": (f"[{'9' * 5000}]", "more than 4,300 digits"),
    "deep": ("[" * 200_000, "nested too deep"),
    "a lone surrogate": ('{"name": "\\ud800"}', "lone surrogate"),
}


@pytest.mark.parametrize("name", CASES)
def test_an_error_names_file_key_and_value(name: str, tmp_path: Path) -> None:
    """In one short line."""
    text, message = CASES[name]
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ModelError) as caught:
        read(EXAMPLE, path)
    assert message in caught.value.message
    assert len(caught.value.message) < 200
    assert str(caught.value.where).startswith(str(path))
    assert str(caught.value.hint).endswith("Make it again.")


def test_other_paths_are_refused(tmp_path: Path) -> None:
    """Missing, a folder, a loop of links, a pipe, and an invalid name."""
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
    """With the byte."""
    with pytest.raises(DataError, match="not UTF-8 \\(byte 1\\)"):
        parse(Kind(object, DataError, ""), b'"\xff"', "a")


def test_yaml_scalars_are_text(tmp_path: Path) -> None:
    """`off`, a time and a date are the same as on the command line."""
    path = tmp_path / "a.yaml"
    path.write_text("a: 1\nb: [x, 2.5]\nc: off\nd: -4:4:1\nf: true\ng:\nh: ''\n")
    assert read_yaml(path) == {
        "a": "1", "b": ["x", "2.5"], "c": "off", "d": "-4:4:1", "f": "true", "g": None, "h": "",
    }  # fmt: skip
    path.write_text("# nothing\n")
    assert read_yaml(path) == {}
    path.write_text("- a\n")
    with pytest.raises(ConfigError, match="expected object, this is list"):
        read_yaml(path)


BAD_YAML = {
    "a Python object": ("a: 1\nb: !!python/object/apply:os.system [true]", "not YAML", 2),
    "an unknown tag": ("a: !own 1", "not YAML", 1),
    "deep": ("[" * 2000, "nested too deep", None),
    "a key twice": ("a: 1\nb: 2\na: 3", "`a` is named twice", 3),
    "a list as a key": ("? [a]\n: b", "unhashable key", 1),
    "incomplete": ("a: [", "not YAML", 1),
    "two documents": ("a: 1\n---\nb: 2", "not YAML", 2),
}


@pytest.mark.parametrize("name", BAD_YAML)
def test_bad_yaml_is_refused_with_its_line(name: str) -> None:
    text, message, line = BAD_YAML[name]
    with pytest.raises(Malformed) as caught:
        decode_yaml(text)
    assert message in caught.value.message
    assert caught.value.line == line
