"""Strategies: text, JSON, YAML and files of rows that are right, nearly right or hostile; damaged JSON and tensors."""

import copy
import json
import struct
from collections.abc import Callable
from functools import partial, reduce
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st

HALF = "\ud800"
# Values that are wrong almost everywhere: of other types, too large, no numbers.
ODD = st.sampled_from((
    None, True, False, 0, -1, 1.5, 10**30, -(2**63), float("nan"), float("inf"), "", "text", "a\x00b", "\x1b[31m", HALF,
    [], {}, [[]], [None], {"": None}, "two\nlines", "\u202e", "x" * 300,
))  # fmt: skip
WORDS = st.sampled_from(["text", "prompt", "completion", "instruction", "output", "messages", "label", "x", "é", ""])
# A few characters of each sort: hypothesis needs seconds to make its tables of all of Unicode.
_CHARACTERS = "".join(map(chr, range(128))) + "\x85\x9b\xa0é²ß٣\u0301\u200f\u2028\u202e\ufeff\uffff漢🐍"
PLAIN = st.lists(st.sampled_from(_CHARACTERS), max_size=12).map("".join)
VALUES: st.SearchStrategy[Any] = st.recursive(
    ODD | st.integers() | st.floats() | PLAIN,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS | PLAIN, inner, max_size=4),
    max_leaves=8,
)
_DEPTHS = st.sampled_from([49, 50, 51, 5000, 100_000])
DEEP = st.one_of(_DEPTHS.map(lambda n: "[" * n + "]" * n), _DEPTHS.map(lambda n: '{"a":' * n + "1" + "}" * n))
_TOKENS = [
    '"', "\\", "{", "}", "[", "]", ":", ",", "1", "-", ".", "e9", "null", "NaN", "a", "\\u", "d800", " ", "\n", "\t",
    "\x00", "true", '"a"', '"a":', "9" * 5000,
]  # fmt: skip
JSON_TEXT = VALUES.map(json.dumps) | st.lists(st.sampled_from(_TOKENS), max_size=12).map("".join) | DEEP | PLAIN
_YAML = [
    "a", "b: ", "- ", "\n", "  ", "&x ", "*x", "!!python/name:os.system ", "!!set ", "!!binary ", "? ", ": ", "[", "]",
    "{", "}", ",", "|", ">\n ", "'", '"', "---\n", "<<: ", "1:30", "2020-13-45", "\t", "#", "%YAML 9.9\n", "\x01", "é",
    "seed", "max_steps", "=", "!!int x", "9" * 5000, "@", "`",
]  # fmt: skip
YAML_TEXT = st.one_of(
    st.lists(st.sampled_from(_YAML), max_size=20).map("".join),
    st.sampled_from(["&a [" * n + "]" * n for n in (10, 60, 3000)] + ["{a: " * n + "}" * n for n in (10, 60, 3000)]),
    PLAIN,
)


def as_bytes(texts: st.SearchStrategy[str]) -> st.SearchStrategy[bytes]:
    """Text in UTF-8, in UTF-16, cut off, or with bytes that are no text."""
    right = texts.map(lambda text: text.encode("utf-8", "surrogatepass"))
    odd = st.sampled_from([b"\xff", b"\xc3(", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\x00", b"\r", b"\n"])
    spliced = st.builds(lambda text, part, at: text[:at] + part + text[at:], right, odd, st.integers(0, 40))
    cut = st.builds(lambda text, at: text[:at], right, st.integers(0, 60))
    return st.one_of(right, right, spliced, cut, texts.map(lambda text: text.encode("utf-16", "surrogatepass")))


LINES = st.lists(st.dictionaries(WORDS, VALUES, max_size=3).map(json.dumps) | JSON_TEXT, max_size=4).map("\n".join)
_CELLS = st.lists(st.lists(PLAIN | st.sampled_from(['"', '"a', "a\x00b", "1", ""]), max_size=4), max_size=5)
_TABLES = st.builds(lambda rows, by: "\n".join(by.join(row) for row in rows), _CELLS, st.sampled_from([",", "\t", ";"]))
# Suffix and content of a file of rows.
FILES = st.one_of(
    st.tuples(st.sampled_from([".jsonl", ".json"]), as_bytes(LINES)),
    st.tuples(st.just(".json"), as_bytes(st.lists(VALUES, max_size=4).map(json.dumps))),
    st.tuples(st.sampled_from([".csv", ".tsv"]), as_bytes(_TABLES)),
    st.tuples(st.just(".txt"), as_bytes(PLAIN)),
    st.tuples(st.sampled_from([".parquet", "", ".bin"]), st.binary(max_size=60)),
)


def changed(good: Any) -> st.SearchStrategy[Any]:
    """A document like `good` in which one value was replaced or removed."""
    return st.builds(partial(_edited, good), st.sampled_from(_places(good)), ODD | VALUES, st.booleans())


def _places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value[:3]) if isinstance(value, list) else ()
    return [at, *(place for key, item in items for place in _places(item, (*at, key)))]


def _edited(good: Any, at: tuple[Any, ...], new: Any, drop: bool) -> Any:
    if not at:
        return new
    value = parent = copy.deepcopy(good)
    for key in at[:-1]:
        parent = parent[key]
    if drop:
        del parent[at[-1]]
    else:
        parent[at[-1]] = new
    return value


def broken_tensors(good: bytes) -> st.SearchStrategy[bytes]:
    """A safetensors file like `good`: with another header, cut off, or with another byte."""
    size = struct.unpack("<Q", good[:8])[0]
    header, data = json.loads(good[8 : 8 + size]), good[8 + size :]
    headers = as_bytes(changed(header).map(json.dumps) | JSON_TEXT)
    framed = headers.map(lambda text: struct.pack("<Q", len(text)) + text + data)
    sizes = st.integers(0, 2**64 - 1).map(lambda n: struct.pack("<Q", n) + good[8:])
    cut = st.integers(0, len(good)).map(lambda n: good[:n])
    flipped = st.builds(
        lambda at, bits: good[:at] + bytes([good[at] ^ bits]) + good[at + 1 :],
        st.integers(0, len(good) - 1), st.integers(1, 255),
    )  # fmt: skip
    return st.one_of(framed, framed, sizes, cut, flipped, st.binary(max_size=40))


def fuzz(*strategies: st.SearchStrategy[Any], examples: tuple[tuple[Any, ...], ...] = ()) -> Callable[..., Any]:
    """Make a function of generated values a test; `examples` are earlier failures and run first."""
    cases = [example(*values) for values in reversed(examples)]
    return lambda test: reduce(lambda decorated, case: case(decorated), cases, given(*strategies)(test))
