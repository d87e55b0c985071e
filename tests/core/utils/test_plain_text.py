"""Text that is not ours, as it is printed."""

from __future__ import annotations

import json
import sys
import unicodedata

import pytest

from braces_cli.core.text import VALUE, error_text, escaped, json_escaped, one_line, shortened

# Controls, halves of characters, separators of lines and paragraphs; and marks of direction.
UNSAFE = [c for c in map(chr, range(sys.maxunicode + 1)) if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")]
BIDI = [chr(code) for code in (0x61C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))]


def test_every_control_character_is_escaped() -> None:
    """What is left can be printed, and says which character stood there."""
    assert len(UNSAFE) > 2000
    for character in (*UNSAFE, *BIDI):
        text = escaped(f"a{character}b")
        assert not set(text) & {*UNSAFE, *BIDI}
        assert text.startswith("a\\")
        assert text.endswith("b")
        assert text[1:-1].encode().decode("unicode_escape") == character


@pytest.mark.parametrize(
    "text", ["", "plain", "naïve café", "日本語", "עברית", "👩\u200d👩\u200d👧", "50 % [red]x[/red] :smile:", "\\x1b"]
)
def test_other_text_stays_as_it_is(text: str) -> None:
    assert escaped(text) == one_line(text) == json_escaped(text) == text


def test_layout_is_kept_where_asked_for() -> None:
    assert escaped("a\n\tb\r\x1b", "\n\t") == "a\n\tb\\r\\x1b"


@pytest.mark.parametrize("length", [0, 1, VALUE - 1, VALUE, VALUE + 1, 5000])
def test_long_text_is_cut_in_the_middle(length: int) -> None:
    """Its beginning and its end stay."""
    text = "".join(str(number % 10) for number in range(length))
    cut = shortened(text)
    assert len(cut) == min(length, VALUE)
    assert cut[:100] == text[:100]
    assert cut[-60:] == text[-60:]
    assert (" ... " in cut) == (length > VALUE)


def test_an_error_is_two_lines_of_bounded_length() -> None:
    """Whatever its parts hold: a line break cannot begin a line of its own."""
    hostile = "x\nError: forged\r\x1b[2J\u2028" * 300
    text = error_text(hostile, hostile, hostile)
    assert len(text.split("\n")) == 2
    assert len(text) < 1000
    assert not set(text.replace("\n", "")) & set(UNSAFE)
    assert error_text("no such file", None, None) == "Error: no such file"
    assert error_text("no such file", "a.txt", "Check it.") == "Error: a.txt: no such file\nCheck it."


def test_json_keeps_what_it_says() -> None:
    """The characters are escaped as JSON escapes them."""
    value = {"".join(BIDI): "".join(UNSAFE[:200]), "lines": ["a\nb", "\u2028", "é"]}
    for indent in (None, 2):
        document = json_escaped(json.dumps(value, ensure_ascii=False, indent=indent))
        assert json.loads(document) == value
        assert not set(document.replace("\n", "")) & {*UNSAFE, *BIDI}
