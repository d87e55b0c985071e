"""The command line is called here, too."""

from tests.cli.conftest import braces  # noqa: F401
