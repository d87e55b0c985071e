"""Names that other tools have for the settings."""

from __future__ import annotations

from braces_cli.cli.main import build_app
from braces_cli.cli.options import help_of, setting_names
from braces_cli.core.config import _SETTING_NAMES, matching_setting, setting_hint

COMMANDS = (["train"], ["eval"], ["steer"], ["attr-build"], ["merge"], ["inspect", "find"])


def known(names: list[str]) -> set[str]:
    return setting_names(help_of(build_app(), names)[1])


def test_every_setting_named_is_one_of_a_command():
    """A renamed option must be renamed in the table; no command has both a foreign name and its replacement."""
    there = set().union(*map(known, COMMANDS))
    assert {setting for names in _SETTING_NAMES.values() for setting in names} <= there
    for names in map(known, COMMANDS):
        assert not [name for name in _SETTING_NAMES if name in names and matching_setting(name, names)]


def test_the_first_name_that_the_command_has():
    assert matching_setting("--learning-rate", known(["train"])) == "lr"
    assert matching_setting("learning_rate", known(["steer"])) is None
    assert matching_setting("--output_path", known(["steer"])) == "output"
    assert matching_setting("--output-path", known(["train"])) == "output_dir"
    assert matching_setting("-n", known(["steer"])) == "max_new_tokens"
    assert matching_setting("-N", known(["steer"])) is None


def test_earlier_names_of_options():
    names = known(["steer"])
    assert matching_setting("--beside", names) == "show_unsteered"
    assert matching_setting("--against", names) == "baselines"
    assert matching_setting("--judge-model", names) == "reference_model"


def test_hints_name_ours_or_what_resembles():
    assert setting_hint("num_train_epochs", known(["train"])) == "Use `epochs`."
    assert setting_hint("epoch", {"epochs", "lr"}) == "Did you mean epochs?"
    assert setting_hint("zzz", {"epochs", "lr"}) == ""
