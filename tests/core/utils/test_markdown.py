"""Names in Markdown: a reader sees them as they are, and no path of this disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from braces_cli.core import markdown
from tests.cli.test_streams import HOSTILE, shown

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
}


def rendered(source: str) -> str:
    """What the Markdown library that comes with Rich shows of a paragraph, and nothing but text may it be."""
    from markdown_it import MarkdownIt

    parts = []
    for token in MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(source):
        assert token.type in ("paragraph_open", "inline", "paragraph_close")
        for child in token.children or ():
            assert child.type in ("text", "text_special", "code_inline"), child
            parts.append(child.content)
    return "".join(parts)


@pytest.mark.parametrize("value", [*MARKUP.values(), "plain", "popqa_gen", "1e-05", "a__b", "-5"], ids=str)
def test_markup_is_shown_and_not_obeyed(value: str) -> None:
    """As running text and as code, on one line."""
    expected = value.replace("\n", "\\n")
    assert rendered(f"name: {markdown.text(value)}") == f"name: {expected}"
    assert rendered(f"name: {markdown.code(value)}") == f"name: {expected}"


@pytest.mark.parametrize("value", [*MARKUP.values(), *HOSTILE.values()], ids=lambda value: repr(value[:12]))
def test_a_cell_stays_a_cell(value: str) -> None:
    """No bar ends it, no line break ends its row, no control character is left."""
    from markdown_it import MarkdownIt

    table = f"| a | b |\n|---|---|\n| {markdown.text(value)} | {markdown.code(value)} |\n"
    tokens = [token.type for token in MarkdownIt("commonmark").enable("table").parse(table)]
    assert tokens.count("td_open") == 2
    assert tokens[-1] == "table_close"
    assert not shown(table)


def test_words_without_markup_are_not_escaped() -> None:
    """So that pages stay readable as text."""
    for value in ("embedded_popqa", "openai-community/gpt2", "0.41 ± 0.02", "a: b, c (d)", "50 %", "+0.1"):
        assert markdown.text(value) == value


def test_a_path_is_named_by_its_last_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Absolute, relative, of a home; a hub id stays, unless a folder has that name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    for path in (tmp_path / "models" / "mine", "models/mine", "./mine", "../x/mine", "~/mine", "a/b/mine"):
        assert markdown.name(str(path)) == "mine"
    for name in ("owner/name", "gpt2", "embedded@1"):
        assert markdown.name(name) == name
    command = [
        "braces",
        "train",
        "--model",
        "models/mine",
        f"--data={tmp_path}/rows.jsonl",
        "--lr",
        "1e-3",
        "--adapter",
        "o/n",
    ]
    words = ["braces", "train", "--model", "mine", "--data=rows.jsonl", "--lr", "1e-3", "--adapter", "o/n"]
    assert markdown.words(command) == words
