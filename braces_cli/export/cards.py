"""Model cards of exported folders, from the templates in `assets/export`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from braces_cli.core.models.hub import card_header, is_linked
from braces_cli.core.render import render


def card(export: str, facts: dict[str, Any]) -> str:
    """README.md of an exported folder.

    Args:
        export: name of the kind of export, such as `merge`.
        facts: printed by the command.
    """
    base = facts["model"]
    name = Path(base).name
    more = {
        "name": name,
        "base_model": base if is_linked(base) else "",
        "steering": ", ".join(f"{attribute} at s = {s:g}" for attribute, s in facts["attributes"].items()) or "none",
    }
    if export == "merge":
        # On the hub `merge` is a combination of several models; base and adapter in one are a `finetune`.
        more["header"] = card_header(
            base, name=name, library="transformers", relation="finetune", tags=("braces", "llmbraces")
        )
    return render(f"export/{export}_card.md.j2", facts | more)
