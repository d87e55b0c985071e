"""Tables on a terminal of 80 columns: numbers and words stay whole, and no column is lost."""

from __future__ import annotations

import re

import pytest

from braces_cli.cli import console as console_module
from braces_cli.cli.console import cell, file_size, print_pairs, print_table
from braces_cli.cli.table_layout import is_number, layout

COLUMNS = ["s", "score", "95 %", "perplexity", "dist-1", "dist-2", "dist-3", "rep-4", "n"]
ROWS = [[-4.0, 0.123, "0.10-0.21", 123456.789, 0.5123, 0.6123, 0.7123, 0.01234, 1024] for _ in range(3)]


def lines(block: dict[int, int]) -> int:
    """Characters of a line of a table with these columns."""
    return sum(width + 3 for width in block.values()) + 1


def test_columns_without_room_go_into_further_blocks() -> None:
    """Each begins with the first column, each column is there once, and none is wider than the terminal."""
    texts = [COLUMNS, *([cell(value) for value in row] for row in ROWS)]
    blocks = layout(texts, 60)
    assert len(blocks) == 2
    assert all(0 in block and lines(block) <= 60 for block in blocks)
    assert sorted(index for block in blocks for index in block if index) == list(range(1, len(COLUMNS)))
    for block in blocks:
        assert all(width >= max(len(row[index]) for row in texts[1:]) for index, width in block.items())
    assert len(layout(texts, 10_000)) == 1


def test_key_columns_begin_each_block() -> None:
    """A row is known in every block."""
    texts = [["task", "n", "system", "value", "change"], ["truthfulqa", "817", "adapter", "0.301 ± 0.015", "+0.05"]]
    blocks = layout(texts, 40, (0, 2))
    assert len(blocks) > 1
    assert all({0, 2} <= set(block) for block in blocks)
    assert {index for block in blocks for index in block} == set(range(5))


def test_long_texts_share_what_numbers_leave() -> None:
    """A path is broken, a word is not."""
    texts = [["name", "value", "text"], ["a", "0.25", "word " * 40], ["b", "12,345", "/a/long/path" * 10]]
    (block,) = layout(texts, 80)
    assert lines(block) <= 80
    assert block[1] == len("12,345")
    assert block[2] > 40


@pytest.mark.parametrize(("text", "number"), [("0.41 ± 0.02", True), ("-1.5", True), ("9 layers", False), ("", False)])
def test_numbers_are_told_from_words(text: str, number: bool) -> None:
    """A number with its error is one."""
    assert is_number(text) is number


def test_nothing_is_wrapped_where_stdout_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """A pipe gets each row on one line."""
    print_table("", ["a", "b"], [["x", "word " * 100]])
    assert "word " * 99 in capsys.readouterr().out


def test_no_number_is_broken_at_80_columns(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As printed."""
    real = console_module.console

    def narrow() -> object:
        out = real()
        out.width = 80
        return out

    monkeypatch.setattr(console_module, "console", narrow)
    print_table("title", COLUMNS, ROWS)
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    for value in ROWS[0]:
        assert re.search(rf"(?<!\S){re.escape(cell(value))}(?!\S)", shown), value


def test_pairs_leave_out_what_is_empty(capsys: pytest.CaptureFixture[str]) -> None:
    """None, empty lists and tuples; lists are joined and labels used."""
    print_pairs("", {"a": None, "b": (), "c": [], "d": {}, "e_f": [1, 2], "g": 0}, {"g": "zero"})
    shown = capsys.readouterr().out
    assert "e f" in shown
    assert "1, 2" in shown
    assert "zero" in shown
    assert not re.search(r"\b[abcd]\b", shown)


def test_sizes_have_units() -> None:
    """No bare bytes."""
    assert [file_size(n) for n in (0, 999, 12_345, 1_234_567_890)] == ["0 bytes", "999 bytes", "12.3 kB", "1.23 GB"]
