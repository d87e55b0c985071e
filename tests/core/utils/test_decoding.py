"""Text of JSON and YAML: what is read, what is refused, and that nothing else in the package parses either."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest

from braces_cli.core.utils.decoding import DEPTH, Malformed, decode, decode_yaml, is_half

PACKAGE = Path(__file__).parents[3] / "braces_cli"
PARSERS = {
    ("json", "load"), ("json", "loads"), ("json", "JSONDecoder"), ("yaml", "load"), ("yaml", "safe_load"),
    ("yaml", "parse"), ("yaml", "compose"), ("msgspec", "convert"),
}  # fmt: skip
# The file that parses; that of schemas; and a program that runs where braces cannot be imported, and reads what
# `export/verification.py` wrote for it.
ALLOWED = {"core/utils/decoding.py", "core/utils/documents.py", "export/verification_process.py"}


def parser_calls(source: str) -> set[str]:
    """Names of parsers that a file calls or imports by name."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found |= {f"{node.value.id}.{node.attr}"} if (node.value.id, node.attr) in PARSERS else set()
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names if (node.module, alias.name) in PARSERS}
    return found


def test_one_file_parses_json_and_yaml() -> None:
    """Files of every kind go through it, rows too."""
    found = {str(path.relative_to(PACKAGE)): parser_calls(path.read_text("utf-8")) for path in PACKAGE.rglob("*.py")}
    assert {name for name, calls in found.items() if calls} == ALLOWED


def test_the_search_sees_parsers() -> None:
    """Or the test above would prove nothing."""
    assert parser_calls("import json\nx = json.loads('1')") == {"json.loads"}
    assert parser_calls("from json import load\nimport yaml\nyaml.safe_load('')") == {"json.load", "yaml.safe_load"}
    assert parser_calls("import json\njson.dumps(1)") == set()


@pytest.mark.parametrize("value", [1, -1.5, "é😀", None, True, [1, [2, {"a": []}]], {"a": {"b": 10**30}}])
def test_json_is_read_as_it_was_written(value: Any) -> None:
    """Escaped or not."""
    assert decode(json.dumps(value)) == value
    assert decode(json.dumps(value, ensure_ascii=False)) == value


BAD_JSON = {
    "nothing": ("", "nothing in it"),
    "blanks": (" \n", "nothing in it"),
    "cut off": ('{"a": ', "broken JSON"),
    "two values": ("{} {}", "broken JSON: Extra data"),
    "a key twice": ('{"a": 1, "b": {"c": 1, "c": 2}}', "`c` is named twice"),
    "NaN": ('{"a": NaN}', "NaN is no number"),
    "infinity": ("[-Infinity]", "-Infinity is no number"),
    "beyond floats": ("[1e999]", "larger than any number"),
    "many digits": (f"[{'9' * 5000}]", "more than 4,300 digits"),
    "deep lists": ("[" * (DEPTH + 1) + "]" * (DEPTH + 1), f"more than {DEPTH} deep"),
    "deep objects": ('{"a":' * 60 + "1" + "}" * 60, "deep"),
    "deeper than Python goes": ("[" * 200_000, "deep"),
    "half a character": ('{"a": ["x", "\\ud800"]}', "half a character (a lone surrogate) in `a[1]`"),
    "half a character as a key": ('{"a": {"\\udc00": 1}}', "half a character"),
}


@pytest.mark.parametrize("name", BAD_JSON)
def test_bad_json_is_refused(name: str) -> None:
    """In words, whatever Python's parser would have made of it."""
    text, message = BAD_JSON[name]
    with pytest.raises(Malformed) as caught:
        decode(text)
    assert message in caught.value.message


def test_the_line_of_a_fault() -> None:
    """Of broken text and of a key that comes twice."""
    for text, line in (('{\n"a": 1,\n"b": }', 3), ('{\n"a": 1,\n"a": 2\n}', 3)):
        with pytest.raises(Malformed) as caught:
            decode(text)
        assert caught.value.line == line


def test_what_rows_and_files_of_others_may_hold() -> None:
    """Rows: NaN, as Python writes it. Files of other programs: what their own readers take."""
    assert decode('{"a": Infinity}', constants=True) == {"a": float("inf")}
    assert decode('{"a": 1, "a": "\\ud800"}', foreign=True) == {"a": "\ud800"}
    with pytest.raises(Malformed, match="twice"):
        decode('{"a": 1, "a": 2}', constants=True)
    with pytest.raises(Malformed, match="deep"):
        decode("[" * 60 + "]" * 60, foreign=True)
    # A pair of surrogates is a character.
    assert decode('["\\ud83d\\ude00"]') == ["😀"]
    assert is_half("\ud83d")
    assert not is_half("😀")


def test_yaml_is_read() -> None:
    """Words stay words: neither `off` nor a time nor a date is anything else. An alias may stand for one value."""
    text = "a: 1\nb: [x, 2.5]\nc: off\nd: -4:4:1\ne: 2001-99-99\nf: &one 0x10\ng: *one\nh: 1e-3\ni: true\nj:\n"
    expected = {
        "a": 1, "b": ["x", 2.5], "c": "off", "d": "-4:4:1", "e": "2001-99-99", "f": 16, "g": 16, "h": "1e-3", "i": True,
        "j": None,
    }  # fmt: skip
    assert decode_yaml(text) == expected
    assert decode_yaml("") is None


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
BAD_YAML = {
    "a tag of Python": ("a: 1\nb: !!python/object/apply:os.system [true]", "a tag", None),
    "a tag of YAML": ("a: !!binary aGk=", "a tag", None),
    "a tag of somebody": ("a: !own 1", "a tag", None),
    "a bomb of aliases": (BOMB, "an alias of a list or mapping", 2),
    "a circle": ("a: &a [*a]", "an alias of a list or mapping", 1),
    "deep lists": (f"a: {'[' * 60}{']' * 60}", "deep", 1),
    "deeper than Python goes": ("[" * 5000, "deep", 1),
    "deep mappings": ("\n".join(f"{' ' * depth}a:" for depth in range(60)), "deep", None),
    "a key twice": ("a: 1\nb: 2\na: 3", "`a` is named twice", 3),
    "a list as a key": ("? [a]\n: b", "a key must be plain text", 1),
    "an unknown alias": ("a: *b", "not YAML", 1),
    "torn": ("a: [", "not YAML", None),
    "a number of no digits": ("a: 0x_", "not YAML", None),
    "half a character": ('a: "\\ud800"', "half a character (a lone surrogate) in `a`", None),
    "two documents": ("a: 1\n---\nb: 2", "not YAML", None),
}


@pytest.mark.parametrize("name", BAD_YAML)
def test_bad_yaml_is_refused(name: str) -> None:
    """At once, before anything is built."""
    text, message, line = BAD_YAML[name]
    with pytest.raises(Malformed) as caught:
        decode_yaml(text)
    assert message in caught.value.message
    assert line is None or caught.value.line == line
