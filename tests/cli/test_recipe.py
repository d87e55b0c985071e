"""`braces recipe`: the list and the copies of recipes."""

import pytest

from braces_cli.cli.recipe import recipes


def test_every_recipe_is_listed(braces):
    listed = braces("recipe", "list", "--format", "json").json
    assert [row["name"] for row in listed] == sorted(recipes())
    assert all(row["description"] for row in listed)
    assert "small-sentiment" in braces("recipe", "list").out


def test_a_copy_is_a_config_of_train(braces, tmp_path):
    outcome = braces("recipe", "copy", "small-sentiment", "--output-dir", tmp_path, "--format", "json")
    assert outcome.code == 0, outcome.err
    copied = tmp_path / "small-sentiment.yaml"
    assert outcome.json == {"recipe": "small-sentiment", "output": str(copied)}
    assert copied.read_text(encoding="utf-8") == recipes()["small-sentiment"]
    settings = braces("train", "--config", copied, "--dry-run", "--format", "json").json["settings"]
    assert settings["max_steps"] == 150


@pytest.mark.parametrize(("name", "hint"), [("small-sentimet", "small-sentiment"), ("zzz", "braces recipe list")])
def test_an_unknown_name_exits_2_with_a_hint(braces, tmp_path, name, hint):
    outcome = braces("recipe", "copy", name, "--output-dir", tmp_path)
    assert outcome.code == 2
    assert hint in outcome.err
    assert not list(tmp_path.iterdir())
