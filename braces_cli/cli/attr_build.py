"""`braces attr-build`: words, texts, descriptions or pairs -> attribute files."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from braces_cli.cli.attr_build_sources import AttributeSources, builders
from braces_cli.cli.command import command
from braces_cli.cli.console import print_json, print_pairs, print_table, progress
from braces_cli.cli.dry_run import show_plan
from braces_cli.cli.options import AdapterSettings, OutputSettings, UploadSettings
from braces_cli.core.utils.errors import ConfigError
from braces_cli.core.utils.paths import user_path
from braces_cli.core.utils.settings import OUTPUT, option

if TYPE_CHECKING:
    from braces_cli.core.attributes.attribute import Attribute

# Words of an attribute that the list shows.
_WORDS_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class AttributeBuildSettings(AttributeSources, AdapterSettings, UploadSettings, OutputSettings):
    """Settings of `braces attr-build`."""

    first_options = (
        "attribute", "describe", "against", "pairs", "words", "examples", "output_dir", "list_attributes",
    )  # fmt: skip

    output_dir: Path | None = option(
        None, help="Folder for attribute files; --list reads it.", flag="--output-dir,--attributes"
    )
    list_attributes: bool = option(
        False, help="List the attributes in --output-dir and --adapter, and the built-in ones.", flag="--list"
    )
    overwrite: bool = option(False, help="Overwrite an existing attribute.", panel=OUTPUT)


@command
def attr_build(settings: AttributeBuildSettings) -> None:
    """Build an attribute from descriptions, pairs, words or texts, or from a built-in list (--list shows them).

    The file fits every dtype and quantisation of its base, and no other base.
    """
    if settings.dry_run:
        show_plan(settings)
        return
    if settings.list_attributes:
        _list(settings)
        return
    results = _build(settings)
    if settings.json:
        print_json(results[0] if len(results) == 1 else {"attributes": results})
        return
    for result in results:
        shown = {key: value for key, value in result.items() if key != "separation"}
        lists = {key: ", ".join(map(str, value)) or None for key, value in shown.items() if isinstance(value, list)}
        print_pairs("attribute written", {**shown, **lists, "examples": result["examples"] or None})


def _build(settings: AttributeBuildSettings) -> list[dict[str, Any]]:
    """Build each attribute, write its file, and say what it was made of."""
    if not settings.output_dir:
        raise ConfigError("missing option", where="--output-dir", hint="See `braces attr-build --help`.")

    from braces_cli.core.attributes.attribute import save_attributes
    from braces_cli.core.attributes.word_lists import check_file_name
    from braces_cli.core.models.hub_upload import check_push, push
    from braces_cli.core.session import open_session
    from braces_cli.core.utils.atomic_files import check_output_file
    from braces_cli.core.utils.output_lock import output_lock

    each = builders(settings)
    paths = {name: settings.output_dir / f"{check_file_name(name)}.safetensors" for name in each}
    results = []
    with output_lock(*paths.values()), progress(settings.quiet) as report:
        for path in paths.values():
            check_output_file(path, settings.overwrite)
        if settings.push_to_hub is not None:
            check_push(settings.push_to_hub)
        session = open_session(settings.model, settings.adapter, settings.load_options)
        for name, build in each.items():
            attribute = build(session, report)
            save_attributes(paths[name], [attribute])
            results.append(_result(attribute, paths[name]))
    if settings.push_to_hub is not None:
        push(settings.output_dir, settings.push_to_hub, [path.name for path in paths.values()])
    return results


def _result(attribute: Attribute, path: Path) -> dict[str, Any]:
    return {
        "attribute": attribute.name,
        "words": attribute.words,
        "examples": attribute.examples,
        "pooling": attribute.pooling,
        **attribute.provenance,
        "layers": len(attribute.layers),
        "steered_layers": attribute.effective_layers,
        "hidden_size": attribute.hidden.shape[1],
        "path": str(path),
    }


def _list(settings: AttributeBuildSettings) -> None:
    """Print the attributes of a folder and of an adapter, where given, and those that are built in."""
    from braces_cli.core.attributes.listing import list_attributes

    folder = settings.output_dir
    if folder is not None and not folder.is_dir():
        raise ConfigError("no such folder", where=str(folder), hint="Give a folder that attr-build wrote to.")
    rows = list_attributes(folder, None if settings.adapter is None else _folder(settings.adapter))
    if settings.json:
        print_json({"attributes": rows})
        return
    # Columns that only files fill are left out where there are none.
    width = max(len(_row(row)) for row in rows)
    columns = ["attribute", "from", "built from", "base", "difference"][:width]
    print_table("attributes", columns, [_row(row) + [None] * (width - len(_row(row))) for row in rows])


def _folder(adapter: str) -> Path:
    if os.path.isfile(user_path(adapter) / "adapter_config.json"):
        return user_path(adapter)
    # A hub id, or a mistake: only these need what imports torch.
    from braces_cli.core.method.adapter_files import find_adapter

    return find_adapter(adapter).folder


def _row(row: dict[str, Any]) -> list[Any]:
    words = row["words"]
    provenance = row["provenance"] or {}
    if provenance.get("describe"):
        built = f"{provenance['describe'][0]} / {provenance['against'][0]}"
    elif provenance.get("pairs"):
        built = f"{provenance['pairs']} pairs"
    else:
        built = f"{row['examples']} texts" if row["examples"] else ", ".join(words[:_WORDS_SHOWN])
    if len(words) > _WORDS_SHOWN:
        built += f" ... ({len(words)})"
    if provenance.get("reduction", "mean") != "mean":
        built += f"; {provenance['reduction']}"
    if row["pooling"] not in (None, "mean"):
        built += f"; {row['pooling']}"
    cells = [row["name"], row["source"], built]
    if row["path"] is None:
        return cells
    base = "unknown" if row["base"] is None else Path(row["base"]).name
    difference = row["statistics"]["difference"]
    mean = None if difference is None else sum(difference) / len(difference)
    return [*cells, f"{base} ({row['layers']} x {row['hidden_size']})", mean]
