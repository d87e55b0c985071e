"""Names that other tools have for the settings."""

from __future__ import annotations

from braces_cli.cli.app import build_app
from braces_cli.cli.typer_internals import help_of, setting_names
from braces_cli.core.utils.other_names import _OURS, matching_setting, setting_hint

COMMANDS = (["train"], ["eval"], ["steer"], ["attr-build"], ["merge"], ["inspect", "find"])


def known(names: list[str]) -> set[str]:
    return setting_names(help_of(build_app(), names)[1])


def test_every_setting_named_is_one_of_a_command():
    """So a renamed option is renamed there, too; and no name of ours is said to be another tool's."""
    there = set().union(*map(known, COMMANDS))
    assert {ours for names in _OURS.values() for ours in names} <= there
    assert not [name for name in _OURS for command in COMMANDS if name in known(command)]


def test_the_first_name_that_the_command_has():
    assert matching_setting("--learning-rate", known(["train"])) == "lr"
    assert matching_setting("learning_rate", known(["steer"])) is None
    assert matching_setting("--output_path", known(["steer"])) == "output"
    assert matching_setting("--output-path", known(["train"])) == "output_dir"
    assert matching_setting("-n", known(["steer"])) == "max_new_tokens"
    assert matching_setting("-N", known(["steer"])) is None


def test_hints_name_ours_or_what_resembles():
    assert setting_hint("num_train_epochs", known(["train"])) == "Use `epochs`."
    assert setting_hint("epoch", {"epochs", "lr"}) == "Did you mean epochs?"
    assert setting_hint("zzz", {"epochs", "lr"}) == ""
