"""`--dry-run`: what a command would do, as a table or as JSON, the same for every command."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from braces_cli.cli.console import print_json, print_pairs
from braces_cli.cli.options import OutputSettings


def show_plan(settings: OutputSettings, facts: dict[str, Any] | None = None, unused: Collection[str] = ()) -> None:
    """Print what is known of the run, and its settings.

    Args:
        facts: what was found out, such as the number of parameters.
        unused: settings without effect in this run, which a table leaves out.
    """
    resolved, facts = settings.resolved(), facts or {}
    if settings.json:
        print_json({**facts, "settings": resolved})
        return
    shown = {name: value for name, value in resolved.items() if name not in unused and name not in facts}
    print_pairs("dry run, nothing is written", {**facts, **shown})
