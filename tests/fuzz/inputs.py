"""Strategies: text, JSON and YAML that is right, nearly right or hostile, and safetensors files broken in any way."""

from __future__ import annotations

import copy
import json
import struct
from typing import Any

from hypothesis import strategies as st

HALF = "\ud800"
# Values that are wrong almost everywhere: of other types, too large, no numbers.
_ODD = (
    None, True, False, 0, -1, 1.5, 10**30, -(2**63), float("nan"), float("inf"), "", "text", "a\x00b", "\x1b[31m", HALF,
    [], {}, [[]], [None], {"": None}, "two\nlines", "\u202e", "x" * 300,
)  # fmt: skip
ODD = st.sampled_from(_ODD)
WORDS = st.sampled_from(["text", "prompt", "completion", "instruction", "output", "messages", "label", "x", "é", ""])
# A few characters of each sort: hypothesis needs seconds to make its tables of all of Unicode.
_CHARACTERS = "".join(map(chr, range(128))) + "\x85\x9b\xa0é²ß٣\u0301\u200f\u2028\u202e\ufeff\uffff漢🐍"
PLAIN = st.lists(st.sampled_from(_CHARACTERS), max_size=12).map("".join)
VALUES: st.SearchStrategy[Any] = st.recursive(
    ODD | st.integers() | st.floats() | PLAIN,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS | PLAIN, inner, max_size=4),
    max_leaves=8,
)
# Text that is nothing, much or nearly JSON.
_DEPTHS = st.sampled_from([49, 50, 51, 5000, 100_000])
DEEP = st.one_of(_DEPTHS.map(lambda n: "[" * n + "]" * n), _DEPTHS.map(lambda n: '{"a":' * n + "1" + "}" * n))
TOKENS = st.lists(
    st.sampled_from(['"', "\\", "{", "}", "[", "]", ":", ",", "1", "-", ".", "e9", "null", "NaN", "a", "\\u", "d800",
                     " ", "\n", "\t", "\x00", "true", '"a"', '"a":', "9" * 5000]),
    max_size=12,
).map("".join)  # fmt: skip
JSON_TEXT = st.one_of(VALUES.map(json.dumps), VALUES.map(json.dumps), TOKENS, DEEP, PLAIN)
_YAML = [
    "a", "b: ", "- ", "\n", "  ", "&x ", "*x", "*y", "!!python/name:os.system ", "!t ", "!!set ", "!!binary ", "? ",
    ": ", "[", "]", "{", "}", ",", "|", ">\n ", "'", '"', "---\n", "...\n", "<<: ", "0x1F", "1:30", "2020-13-45",
    ".nan", "~", "\t", "#", "%YAML 9.9\n", "\x01", "é", "seed", "max_steps", "=", "!!int x", "9" * 5000,
    "!!float ", "@", "`",
]  # fmt: skip
YAML_TEXT = st.one_of(
    st.lists(st.sampled_from(_YAML), max_size=20).map("".join),
    st.dictionaries(PLAIN, VALUES, max_size=4).map(json.dumps),
    st.sampled_from(["&a [" * n + "]" * n for n in (10, 60, 3000)] + ["{a: " * n + "}" * n for n in (10, 60, 3000)]),
    PLAIN,
)


def as_bytes(texts: st.SearchStrategy[str]) -> st.SearchStrategy[bytes]:
    """Text in UTF-8, in other encodings, cut off, or with bytes that are no text."""
    right = texts.map(lambda text: text.encode("utf-8", "surrogatepass"))
    odd = st.sampled_from([b"\xff", b"\xc3(", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\x00", b"\r", b"\n"])
    spliced = st.tuples(right, odd, st.integers(0, 40)).map(lambda t: t[0][: t[2]] + t[1] + t[0][t[2] :])
    cut = st.tuples(right, st.integers(0, 60)).map(lambda t: t[0][: t[1]])
    return st.one_of(right, right, spliced, cut, texts.map(lambda text: text.encode("utf-16", "surrogatepass")))


def changed(good: Any) -> st.SearchStrategy[Any]:
    """A document like `good` in which up to two values were replaced, removed or added."""
    edits = st.lists(st.tuples(st.sampled_from(_places(good)), ODD | VALUES, st.booleans()), max_size=2)
    return edits.map(lambda chosen: _edited(good, chosen))


def _places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [at]
    items = value.items() if isinstance(value, dict) else enumerate(value[:3]) if isinstance(value, list) else ()
    for key, item in items:
        found += _places(item, (*at, key))
    return found


def _edited(good: Any, edits: list[tuple[tuple[Any, ...], Any, bool]]) -> Any:
    value = json.loads(json.dumps(good))
    for at, drawn, drop in edits:
        # Two edits, and later cases, draw the same lists: put into itself, one would be a circle.
        new = copy.deepcopy(drawn)
        if not at:
            value = new
            continue
        try:
            parent = value
            for key in at[:-1]:
                parent = parent[key]
            if drop:
                del parent[at[-1]]
            else:
                parent[at[-1]] = new
        except (LookupError, TypeError):
            continue  # the first edit has taken that place away
    return value


def broken_tensors(good: bytes) -> st.SearchStrategy[bytes]:
    """A safetensors file like `good`: with another header, cut off, or with other bytes."""
    size = struct.unpack("<Q", good[:8])[0]
    header, data = json.loads(good[8 : 8 + size]), good[8 + size :]
    headers = changed(header).map(lambda value: _framed(json.dumps(value).encode("utf-8", "replace"), data))
    texts = as_bytes(JSON_TEXT).map(lambda text: _framed(text, data))
    sizes = st.integers(0, 2**64 - 1).map(lambda n: struct.pack("<Q", n) + good[8:])
    cut = st.integers(0, len(good)).map(lambda n: good[:n])
    flipped = st.tuples(st.integers(0, len(good) - 1), st.integers(1, 255)).map(
        lambda t: good[: t[0]] + bytes([good[t[0]] ^ t[1]]) + good[t[0] + 1 :]
    )
    return st.one_of(headers, headers, texts, sizes, cut, flipped, st.binary(max_size=40))


def _framed(header: bytes, data: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + data
