"""`braces attr-build`: words, texts, descriptions or pairs -> attribute files."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from braces_cli.cli.options import command, show_plan
from braces_cli.cli.output import print_json, print_pairs, print_table, progress
from braces_cli.core.attributes.words import GRADIENT, POOLINGS, REDUCTIONS, built_in
from braces_cli.core.config import METHOD, option
from braces_cli.core.errors import ConfigError
from braces_cli.core.files import user_path
from braces_cli.core.options import AdapterSettings, OutputSettings, OverwriteSettings, UploadSettings

if TYPE_CHECKING:
    from braces_cli.core.attributes.vector import Attribute

# (session, report) -> Attribute.
Build = Callable[..., Any]
# Words of an attribute that the list shows.
_WORDS_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class AttributeBuildSettings(AdapterSettings, OverwriteSettings, UploadSettings, OutputSettings):
    """What attributes are built from, and how."""

    first_options = (
        "attribute", "describe", "against", "pairs", "words", "examples", "output_dir", "list_attributes",
    )  # fmt: skip

    attribute: tuple[str, ...] = option(
        (),
        help="Name of the attribute. Repeatable for built-in lists, and for --pairs with a column `attribute`.",
        metavar="NAME",
        complete=built_in,
    )
    describe: tuple[str, ...] = option(
        (),
        help="Description of a person or text with the attribute, such as 'a cheerful person'. Repeatable.",
        metavar="TEXT",
    )
    against: tuple[str, ...] = option(
        (), help="Description of the opposite; the k-th belongs to the k-th --describe.", metavar="TEXT"
    )
    pairs: Path | None = option(
        None, help="File with rows of `positive` and `negative`: texts, or prompts with completions.", metavar="FILE"
    )
    words: str | None = option(None, help="Words of the attribute, separated by commas.")
    words_file: Path | None = option(None, help="File with the words of the attribute, one per line.")
    examples: Path | None = option(None, help="File with texts instead of words: one per line, or rows with `text`.")
    pooling: str = option("mean", help="Pooling over the tokens of each word or text.", choices=POOLINGS, panel=METHOD)
    reduction: str | None = option(
        None,
        help="Direction of the steering vector: gradient of the attribute's log odds (default), difference of "
        "means (mean), "
        "or, of pairs, their first principal component (pca) or a logistic regression. All but gradient go through an "
        "adapter where there is one.",
        choices=(GRADIENT, *REDUCTIONS),
        panel=METHOD,
    )
    layers: str | None = option(
        None,
        help="Layers of the steering vector, such as 8-20,24 or 1-; auto: those that best separate held-out pairs. "
        "Default: the first half.",
        panel=METHOD,
    )
    apply_chat_template: bool | None = option(
        None,
        help="Apply the chat template to prompts of descriptions and pairs. Default: on if the tokenizer has one.",
        panel=METHOD,
        flag="--apply-chat-template/--no-apply-chat-template",
    )
    output_dir: Path | None = option(
        None, help="Folder for attribute files; --list reads it.", flag="--output-dir,--attributes"
    )
    list_attributes: bool = option(
        False, help="List the attributes in --output-dir and --adapter, and the built-in ones.", flag="--list"
    )

    def check(self) -> None:
        """Refuse several sources of one attribute, and options that need pairs where there are none."""
        super().check()
        if self.dry_run or self.list_attributes:
            return
        if len(self.sources) > 1:
            raise ConfigError("two sources of one attribute", where=", ".join(self.sources), hint="Give one of them.")
        if not self.output_dir:
            raise ConfigError("missing option", where="--output-dir", hint="See `braces attr-build --help`.")
        if not self.attribute and self.sources != ["--pairs"]:
            raise ConfigError("missing option", where="--attribute", hint="See `braces attr-build --help`.")
        if self.sources in (["--describe"], ["--pairs"]):
            return
        for wrong, where in (
            (self.layers == "auto", "--layers auto"),
            (self.apply_chat_template is not None, "--apply-chat-template"),
            (self.reduction not in (None, "mean", GRADIENT), f"--reduction {self.reduction}"),
        ):
            if wrong:
                raise ConfigError("this needs pairs", where=where, hint="Give --describe with --against, or --pairs.")

    @property
    def sources(self) -> list[str]:
        """The options that say what an attribute is built from."""
        given = {
            "--describe": self.describe or self.against, "--pairs": self.pairs, "--words": self.words,
            "--words-file": self.words_file, "--examples": self.examples,
        }  # fmt: skip
        return [name for name, value in given.items() if value is not None and value != ()]


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
    assert settings.output_dir is not None
    from braces_cli.core.adapter.model import open_session
    from braces_cli.core.attributes.vector import save_attributes
    from braces_cli.core.attributes.words import check_file_name
    from braces_cli.core.files import check_output_file, output_lock
    from braces_cli.core.models.hub import check_push, push

    each = builders(settings)
    paths = {name: settings.output_dir / f"{check_file_name(name)}.safetensors" for name in each}
    results = []
    with output_lock(*paths.values()), progress(settings.quiet) as report:
        for path in paths.values():
            check_output_file(path, settings.overwrite)
        if settings.push_to_hub is not None:
            check_push(settings.push_to_hub)
        session = open_session(settings.model, settings.adapter, settings)
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
    from braces_cli.core.attributes.files import list_attributes

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
    from braces_cli.core.adapter.files import find_adapter

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


def builders(settings: AttributeBuildSettings) -> dict[str, Build]:
    """What builds each attribute of an open session; files are read here, before the model is loaded.

    Raises:
        ConfigError: no such attribute, or several names for one.
        DataError: a file that cannot be read.
    """
    source = settings.sources[0] if settings.sources else None
    if source in ("--describe", "--pairs"):
        return _from_pairs(settings)
    each = _from_words(settings, source)
    return {name: _with_layers(build, settings.layers) for name, build in each.items()}


def _from_pairs(settings: AttributeBuildSettings) -> dict[str, Build]:
    """Builders of --describe and --pairs."""
    from braces_cli.core.attributes.build import (
        attribute_from_descriptions,
        attribute_from_pairs,
        check_descriptions,
    )
    from braces_cli.data.dataset import read_pairs

    def details(session: Any) -> dict[str, Any]:
        layers = settings.layers if settings.layers == "auto" else _layers(session, settings.layers)
        chat = settings.apply_chat_template
        return {"pooling": settings.pooling, "reduction": settings.reduction, "layers": layers, "chat": chat}

    if settings.pairs is None:
        name, one, other = _single(settings), settings.describe, settings.against
        check_descriptions(one, other)
        return {
            name: lambda session, report: attribute_from_descriptions(
                session, name, one, other, report, **details(session)
            )
        }
    found = read_pairs(settings.pairs)
    if set(found) == {None}:
        chosen = {_single(settings): found[None]}
    else:
        known = sorted(name for name in found if name is not None)
        if None in found:
            hint = "Name it in every row, or in none."
            raise ConfigError("some rows name their attribute and some do not", where=str(settings.pairs), hint=hint)
        missing = [name for name in settings.attribute if name not in found]
        if missing:
            hint = f"Rows are of {', '.join(known)}."
            raise ConfigError(f"no row of `{missing[0]}`", where=str(settings.pairs), hint=hint)
        chosen = {name: found[name] for name in settings.attribute or known}
    return {
        name: lambda session, report, name=name, pairs=pairs: attribute_from_pairs(
            session, name, pairs, report, **details(session)
        )
        for name, pairs in chosen.items()
    }


def _from_words(settings: AttributeBuildSettings, source: str | None) -> dict[str, Build]:
    """Builders of --words, --words-file, --examples and of built-in lists."""
    from braces_cli.core.attributes.build import attribute_from_texts, build_attribute, built_in_attribute
    from braces_cli.core.attributes.words import clean_words, read_words

    how = (settings.pooling, settings.reduction)
    if source is None:
        lists = built_in()
        for name in settings.attribute:
            if name not in lists:
                hint = f"Built-in lists: {', '.join(lists)}."
                where = "--describe, --pairs, --words, --words-file, --examples"
                raise ConfigError(f"no words for `{name}`", where=where, hint=hint)
        return {
            name: lambda session, report, name=name: built_in_attribute(session, name, report, *how)
            for name in settings.attribute
        }
    name = _single(settings)
    if settings.examples is not None:
        from braces_cli.data.rows import read_texts

        texts = [text.strip() for text in read_texts(settings.examples)]
        return {name: lambda session, report: attribute_from_texts(session, name, texts, report, *how)}
    chosen = clean_words((settings.words or "").split(","))
    if settings.words_file is not None:
        chosen = read_words(settings.words_file)
    elif not chosen:
        raise ConfigError("no words", where="--words", hint="Give at least one word.")
    return {name: lambda session, report: build_attribute(session, name, chosen, report, *how)}


def _single(settings: AttributeBuildSettings) -> str:
    """The one name of an attribute that has one source."""
    if len(settings.attribute) != 1:
        hint = "Give --attribute once; several only for built-in lists and for rows that name their attribute."
        raise ConfigError(f"{len(settings.attribute)} names for one attribute", where="--attribute", hint=hint)
    return settings.attribute[0]


def _with_layers(build: Build, layers: str | None) -> Build:
    """Return the attribute with a steering vector in the named layers."""
    if layers is None:
        return build

    def built(session: Any, report: Any) -> Any:
        from braces_cli.core.attributes.vector import with_steered_layers

        return with_steered_layers(build(session, report), _layers(session, layers))

    return built


def _layers(session: Any, layers: str | None) -> list[int] | None:
    from braces_cli.core.models.ffn import chosen_layers

    return chosen_layers(session.base.model, layers)
