"""Killed commands, two writers and a full disk: the short form of `recipes/kill_and_resume.py`."""

import importlib
from pathlib import Path

import pytest

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.mark.slow
def test_killed_commands_write_the_same_files(tmp_path, monkeypatch):
    """One round of each command; the recipe runs twenty."""
    monkeypatch.syspath_prepend(str(RECIPES))
    recipe = importlib.import_module("kill_and_resume")
    found = recipe.compare(tmp_path / "work", recipe.SHORT, seed=1, short=True)
    assert recipe.faults(found) == []
    assert found.keys() == set(recipe.SHORT)
    assert all(each["killed"]["kills"] >= each["killed"]["identical"] == 1 for each in found.values())
    assert all(each["two_writers"]["refused"] == each["two_writers"]["right"] == 1 for each in found.values())
    assert all(each["full_disk"]["right"] == 1 for each in found.values())


def test_comparison_finds_differences(tmp_path, monkeypatch):
    """Hidden, changed and missing files are differences, times are not."""
    monkeypatch.syspath_prepend(str(RECIPES))
    recipe = importlib.import_module("kill_and_resume")
    contents = {
        "a.json": '{"seconds": 1, "rows": 2}',
        "b.bin": "x",
        "c.bin": "y",
        "d.jsonl": '{"tokens_per_second": 1}',
    }
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
        for name, content in contents.items():
            (tmp_path / place / name).write_text(content)
    one = recipe.files(tmp_path / "one")
    (tmp_path / "two" / "a.json").write_text('{"seconds": 3, "rows": 2}')
    (tmp_path / "two" / "d.jsonl").write_text('{"tokens_per_second": 3}')
    assert recipe.differences(recipe.files(tmp_path / "two"), one) == []
    (tmp_path / "two" / "a.json").write_text('{"seconds": 3, "rows": 3}')
    (tmp_path / "two" / "b.bin").write_text("z")
    (tmp_path / "two" / "c.bin").unlink()
    (tmp_path / "two" / ".out.lock").touch()
    assert recipe.differences(recipe.files(tmp_path / "two"), one) == [".out.lock", "a.json", "b.bin", "c.bin"]
