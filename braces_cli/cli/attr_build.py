"""`braces attr-build`: words or texts -> an attribute file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from braces_cli.cli.command import command
from braces_cli.cli.console import print_json, print_pairs, print_table, progress
from braces_cli.cli.dry_run import show_plan
from braces_cli.cli.options import AdapterSettings, OutputSettings, UploadSettings
from braces_cli.core.attributes.word_lists import POOLINGS, built_in
from braces_cli.core.utils.errors import ConfigError
from braces_cli.core.utils.paths import user_path
from braces_cli.core.utils.settings import OUTPUT, option

# Words of an attribute that the list shows.
_WORDS_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class AttributeBuildSettings(AdapterSettings, UploadSettings, OutputSettings):
    """Settings of `braces attr-build`."""

    first_options = ("attribute", "words", "examples", "output_dir", "list_attributes")

    attribute: str | None = option(None, help="Name of the attribute.", metavar="NAME", complete=built_in)
    words: str | None = option(None, help="Its words, separated by commas.")
    words_file: Path | None = option(None, help="File with its words, one a line.")
    examples: Path | None = option(None, help="Texts in place of words: one a line, or a data file with `text`.")
    pooling: str = option("mean", help="How the tokens of each word or text are pooled.", choices=POOLINGS)
    output_dir: Path | None = option(
        None, help="Folder of attribute files to add to, or to --list.", flag="--output-dir,--attributes"
    )
    list_attributes: bool = option(
        False, help="Show the attributes of --output-dir, of --adapter, and those built in.", flag="--list"
    )
    overwrite: bool = option(False, help="Replace an attribute of the same name.", panel=OUTPUT)


@command
def attr_build(settings: AttributeBuildSettings) -> None:
    """Build an attribute's hidden states from words or texts; with neither, from a built-in list (--list shows them).

    The file fits every dtype and quantisation of its base, and no other base.
    """
    if settings.dry_run:
        show_plan(settings)
        return
    if settings.list_attributes:
        _list(settings)
        return
    result = _build(settings)
    if settings.json:
        print_json(result)
    else:
        words = ", ".join(result["words"]) or None
        print_pairs("attribute written", {**result, "words": words, "examples": result["examples"] or None})


def _build(settings: AttributeBuildSettings) -> dict[str, Any]:
    """Build the attribute, write its file, and say what it was made of."""
    for name, value in (("--attribute", settings.attribute), ("--output-dir", settings.output_dir)):
        if not value:
            raise ConfigError("missing option", where=name, hint="See `braces attr-build --help`.")
    assert settings.attribute is not None
    assert settings.output_dir is not None

    from braces_cli.core.attributes.attribute import save_attributes
    from braces_cli.core.attributes.word_lists import check_file_name
    from braces_cli.core.models.hub_upload import check_push, push
    from braces_cli.core.session import open_session
    from braces_cli.core.utils.atomic_files import check_output_file
    from braces_cli.core.utils.output_lock import output_lock

    path = settings.output_dir / f"{check_file_name(settings.attribute)}.safetensors"
    with output_lock(path), progress(settings.quiet) as report:
        check_output_file(path, settings.overwrite)
        if settings.push_to_hub is not None:
            check_push(settings.push_to_hub)
        build = _builder(settings)
        session = open_session(settings.model, settings.adapter, settings.load_options)
        attribute = build(session, settings.attribute, report, settings.pooling)
        save_attributes(path, [attribute])
    if settings.push_to_hub is not None:
        push(settings.output_dir, settings.push_to_hub, [path.name])
    return {
        "attribute": attribute.name,
        "words": attribute.words,
        "examples": attribute.examples,
        "pooling": attribute.pooling,
        "layers": len(attribute.layers),
        "hidden_size": attribute.hidden.shape[1],
        "path": str(path),
    }


def _builder(settings: AttributeBuildSettings) -> Any:
    """What builds the attribute of an open session; its words or texts are read here, before the model is loaded."""
    given = {"--words": settings.words, "--words-file": settings.words_file, "--examples": settings.examples}
    sources = [name for name, value in given.items() if value is not None]
    if len(sources) > 1:
        raise ConfigError("two sources of words", where=", ".join(sources), hint="Give one of them.")

    from braces_cli.core.attributes.attribute import attribute_from_texts, build_attribute, built_in_attribute
    from braces_cli.core.attributes.word_lists import clean_words, read_words

    if settings.examples is not None:
        from braces_cli.data.texts import read_texts

        texts = [text.strip() for text in read_texts(settings.examples)]
        return lambda session, name, *how: attribute_from_texts(session, name, texts, *how)
    if settings.words is None and settings.words_file is None:
        lists = built_in()
        if settings.attribute not in lists:
            hint = f"Built-in lists: {', '.join(lists)}."
            where = "--words, --words-file, --examples"
            raise ConfigError(f"no words for `{settings.attribute}`", where=where, hint=hint)
        return built_in_attribute
    words = read_words(settings.words_file) if settings.words_file is not None else None
    chosen = words if words is not None else clean_words((settings.words or "").split(","), "--words")
    return lambda session, name, *how: build_attribute(session, name, chosen, *how)


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
    if (user_path(adapter) / "adapter_config.json").is_file():
        return user_path(adapter)
    # A hub id, or a mistake: only these need what imports torch.
    from braces_cli.core.method.adapter_files import find_adapter

    return find_adapter(adapter).folder


def _row(row: dict[str, Any]) -> list[Any]:
    words = row["words"]
    built = f"{row['examples']} texts" if row["examples"] else ", ".join(words[:_WORDS_SHOWN])
    if len(words) > _WORDS_SHOWN:
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
