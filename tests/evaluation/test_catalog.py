"""Names of tasks and groups."""

import tomllib
from pathlib import Path

import pytest

from braces_cli.core.errors import ConfigError
from braces_cli.evaluation import catalog


@pytest.mark.parametrize(("name", "near"), [("truthfulqa_mc3", "truthfulqa_mc1"), ("popqua", "popqa")])
def test_an_unknown_task_is_refused_with_a_suggestion(name, near):
    with pytest.raises(ConfigError, match=f"unknown task `{name}`") as caught:
        catalog.select([name])
    assert near in str(caught.value)


def test_groups_and_names_of_lm_eval_are_resolved():
    selection = catalog.select(["hellaswag,popqa", "truthfulqa"])
    assert selection.names == ["hellaswag", "popqa", "truthfulqa_mc1", "truthfulqa_mc2"]
    with pytest.raises(ConfigError, match="no task given"):
        catalog.select([" , "])


def test_names_are_found_without_the_whole_index(monkeypatch):
    manager = catalog.TaskManager

    def without_defaults(*args, **options):
        assert options.get("include_defaults") is False
        return manager(*args, **options)

    monkeypatch.setattr(catalog, "TaskManager", without_defaults)
    selection = catalog.select(["zero_shot,commonsense", "commonsense_gen", "mmlu_anatomy,gsm8k"])
    assert len(selection.leaves) == 5 + 8 + 8 + 2


def test_every_task_file_is_package_data():
    root = Path(__file__).parents[2]
    globs = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["braces_cli"]
    packed = {file for pattern in globs for file in (root / "braces_cli").glob(pattern)}
    assert set(catalog.BRACES_FOLDER.iterdir()) <= packed
