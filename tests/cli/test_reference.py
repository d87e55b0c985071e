"""The command reference has the texts of `--help`."""

from tests.cli.reference import FILE, reference


def test_the_command_reference_is_current():
    assert FILE.read_text(encoding="utf-8") == reference(), "run: python -m tests.cli.reference --write"
