"""The command reference has the texts of `--help`."""

from tests.cli.reference import FILE, reference


def test_the_command_reference_is_current():
    assert FILE.read_text(encoding="utf-8") == reference(), "run: python -m tests.cli.reference --write"


def test_every_option_has_a_help_text():
    """A field without an entry in the docstring of its settings class would have a default only."""
    for line in reference().splitlines():
        assert "| Default: " not in line
        assert not line.endswith("|  |")
