"""`braces attr-build --list`: which attributes there are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from braces_cli.cli.console import print_json, print_table
from braces_cli.core.attributes.listing import list_attributes
from braces_cli.core.utils.errors import ConfigError

_WORDS = 3


def show_attributes(folder: Path | None, adapter: str | None, as_json: bool) -> None:
    """Print the attributes of a folder and of an adapter, where given, and those that are built in."""
    if folder is not None and not folder.is_dir():
        raise ConfigError("no such folder", where=str(folder), hint="Give a folder that attr-build wrote to.")
    rows = list_attributes(folder, None if adapter is None else _folder(adapter))
    if as_json:
        print_json({"attributes": rows})
        return
    # Columns that only files fill are left out where there are none.
    width = max(len(_row(row)) for row in rows)
    columns = ["attribute", "from", "built from", "base", "difference"][:width]
    print_table("attributes", columns, [_row(row) + [None] * (width - len(_row(row))) for row in rows])


def _folder(adapter: str) -> Path:
    if (Path(adapter).expanduser() / "adapter_config.json").is_file():
        return Path(adapter).expanduser()
    # A hub id, or a mistake: only these need what imports torch.
    from braces_cli.core.method.adapter_files import find_adapter

    return find_adapter(adapter).folder


def _row(row: dict[str, Any]) -> list[Any]:
    words = row["words"]
    built = f"{row['examples']} texts" if row["examples"] else ", ".join(words[:_WORDS])
    if len(words) > _WORDS:
        built += f" ... ({len(words)})"
    if row["pooling"] not in (None, "mean"):
        built += f", {row['pooling']}"
    cells = [row["name"], row["source"], built]
    if row["path"] is None:
        return cells
    base = "unknown" if row["base"] is None else Path(row["base"]).name
    difference = row["statistics"]["difference"]
    mean = None if difference is None else sum(difference) / len(difference)
    return [*cells, f"{base} ({row['layers']} x {row['hidden_size']})", mean]
