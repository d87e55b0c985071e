"""Untrusted text, escaped for a terminal, for JSON and for Markdown."""

import json
import sys
import unicodedata
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from braces_cli.core import text as escaping

# Control characters, surrogates, line and paragraph separators; and marks of text direction.
UNSAFE = [c for c in map(chr, range(sys.maxunicode + 1)) if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")]
BIDI = [chr(code) for code in (0x61C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))]
MARKUP = {
    "link": "[x](https://evil.example)",
    "picture": "![x](//evil.example/p.png)",
    "html": "<script>alert(1)</script><img src=x>",
    "table": "a | b || c",
    "heading": "# x\n## y",
    "code": "a `b` ``c``",
    "emphasis": "*a* _b_ **c** ~~d~~",
    "entity": "&lt;b&gt;",
    "address": "https://evil.example and @somebody",
    "formula": "$x$",
    "escape": "\\*a\\*",
    "control": "a\x1b[31m\u202eb\u2028c",
}


def test_every_control_character_is_escaped() -> None:
    """The escape is the one of Python, so that the character can be identified."""
    assert len(UNSAFE) > 2000
    for character in (*UNSAFE, *BIDI):
        text = escaping.escaped(f"a{character}b")
        assert not set(text) & {*UNSAFE, *BIDI}
        assert text[1:-1].encode().decode("unicode_escape") == character
    assert escaping.escaped("a\n\tb\r\x1b", "\n\t") == "a\n\tb\\r\\x1b"


@pytest.mark.parametrize("length", [0, escaping.VALUE, escaping.VALUE + 1, 5000])
def test_long_text_is_cut_in_the_middle(length: int) -> None:
    text = "".join(str(number % 10) for number in range(length))
    cut = escaping.one_line(text)
    assert len(cut) == min(length, escaping.VALUE)
    assert (cut[:100], cut[-60:]) == (text[:100], text[-60:])
    assert (" ... " in cut) == (length > escaping.VALUE)


def test_an_error_is_two_lines_of_bounded_length() -> None:
    """A line break in a name does not start a line."""
    hostile = "x\nError: forged\r\x1b[2J\u2028" * 300
    text = escaping.error_text(hostile, hostile, hostile)
    assert len(text.split("\n")) == 2
    assert len(text) < 1000
    assert not set(text.replace("\n", "")) & set(UNSAFE)
    assert escaping.error_text("no such file", "a.txt", "Check it.") == "Error: a.txt: no such file\nCheck it."


def test_json_keeps_its_value() -> None:
    value = {"".join(BIDI): "".join(UNSAFE[:200]), "lines": ["a\nb", "\u2028", "é"]}
    for indent in (None, 2):
        document = escaping.json_escaped(json.dumps(value, ensure_ascii=False, indent=indent))
        assert json.loads(document) == value
        assert not set(document.replace("\n", "")) & {*UNSAFE, *BIDI}


def rendered(source: str) -> str:
    """Return the text of a Markdown paragraph; fail if the paragraph contains anything else."""
    parts = []
    for token in MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(source):
        assert token.type in ("paragraph_open", "inline", "paragraph_close")
        for child in token.children or ():
            assert child.type in ("text", "text_special", "code_inline"), child
            parts.append(child.content)
    return "".join(parts)


@pytest.mark.parametrize("value", [*MARKUP.values(), "plain", "popqa_gen", "1e-05", "a__b", "-5"], ids=repr)
def test_markup_in_a_value_is_shown_as_text(value: str) -> None:
    """In a paragraph and in the cell of a table."""
    assert rendered(f"name: {escaping.markdown_text(value)}") == f"name: {escaping.escaped(value)}"
    table = f"| a | b |\n|---|---|\n| {escaping.markdown_text(value)} | b |\n"
    tokens = [token.type for token in MarkdownIt("commonmark").enable("table").parse(table)]
    assert tokens.count("td_open") == 2
    assert tokens[-1] == "table_close"


def test_a_local_path_is_shown_as_its_last_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub id is unchanged, unless a folder has that name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    for path in (tmp_path / "models" / "mine", "models/mine", "./mine", "../x/mine", "~/mine", "a/b/mine"):
        assert escaping.public_name(str(path)) == "mine"
    for name in ("owner/name", "gpt2", "embedded@1"):
        assert escaping.public_name(name) == name
    command = f"braces train --model models/mine --data={tmp_path}/rows.jsonl --lr 1e-3 --adapter o/n".split()
    assert (
        " ".join(escaping.public_command(command))
        == "braces train --model mine --data=rows.jsonl --lr 1e-3 --adapter o/n"
    )
