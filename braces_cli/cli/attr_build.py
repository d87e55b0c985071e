"""`braces attr-build`: build attributes from words, texts, descriptions or pairs, or list them."""

import os
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from braces_cli.cli.options import command, show_plan
from braces_cli.cli.output import print_json, print_pairs, print_table, progress
from braces_cli.core.attributes.words import GRADIENT, POOLINGS, REDUCTIONS, built_in
from braces_cli.core.config import METHOD, SETTINGS_FILE, option, write_settings
from braces_cli.core.errors import ConfigError, DataError
from braces_cli.core.files import user_path
from braces_cli.core.options import AdapterSettings, ChatSettings, OutputSettings, OverwriteSettings, UploadSettings

# Words of an attribute in a list.
_WORDS_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class AttributeBuildSettings(AdapterSettings, ChatSettings, OverwriteSettings, UploadSettings, OutputSettings):
    """Settings of `braces attr-build`.

    Attributes:
        attribute: Name of the attribute. Repeatable for built-in lists, and for --pairs with a column `attribute`.
        describe: Description of a person or text with the attribute, such as 'a cheerful person'. Repeatable.
        against: Description of the opposite; the k-th belongs to the k-th --describe.
        pairs: File with rows of `positive` and `negative`: texts, or prompts with completions.
        words: Words of the attribute, separated by commas.
        words_file: File with the words of the attribute, one per line.
        examples: File with texts instead of words: one per line, or rows with `text`.
        pooling: Pooling over the tokens of each word or text.
        reduction: Direction of the steering vector: gradient of the attribute's log odds (default), difference of means
            (mean), or, of pairs, their first principal component (pca) or a logistic regression. All but gradient go
            through an adapter where there is one.
        layers: Layers of the steering vector, such as 8-20,24 or 1-; auto: those that best separate held-out pairs.
            Default: the first half.
        apply_chat_template: Apply the chat template to prompts of descriptions and pairs. Default: on if the tokenizer
            has one.
        output_dir: Folder for attribute files; --list reads it.
        list_attributes: List the attributes in --output-dir and --adapter, and the built-in ones.
    """

    first_options = (
        "attribute", "describe", "against", "pairs", "words", "examples", "output_dir", "list_attributes",
    )  # fmt: skip

    attribute: tuple[str, ...] = option((), metavar="NAME")
    describe: tuple[str, ...] = option((), metavar="TEXT")
    against: tuple[str, ...] = option((), metavar="TEXT")
    pairs: Path | None = option(None, metavar="FILE")
    words: str | None = option(None)
    words_file: Path | None = option(None)
    examples: Path | None = option(None)
    pooling: str = option("mean", choices=POOLINGS, panel=METHOD)
    reduction: str | None = option(None, choices=(GRADIENT, *REDUCTIONS), panel=METHOD)
    layers: str | None = option(None, panel=METHOD)
    apply_chat_template: bool | None = option(None, panel=METHOD, flag="--apply-chat-template/--no-apply-chat-template")
    output_dir: Path | None = option(None, flag="--output-dir,--attributes")
    list_attributes: bool = option(False, flag="--list")

    def check(self) -> None:
        """Refuse several sources of one attribute, and options for pairs without pairs."""
        super().check()
        if self.dry_run or self.list_attributes:
            return
        if len(self.sources) > 1:
            raise ConfigError("two sources of one attribute", where=", ".join(self.sources), hint="Give one of them.")
        if not self.output_dir:
            raise ConfigError("missing option", where="--output-dir", hint="See `braces attr-build --help`.")
        if not self.attribute and self.sources != ["--pairs"]:
            raise ConfigError("missing option", where="--attribute", hint="See `braces attr-build --help`.")
        if len(self.attribute) != 1 and self.sources not in ([], ["--pairs"]):
            hint = "Give --attribute once; several only for built-in lists and for rows with an attribute."
            raise ConfigError(f"{len(self.attribute)} names for one attribute", where="--attribute", hint=hint)
        if self.sources in (["--describe"], ["--pairs"]):
            return
        for wrong, where in (
            (self.layers == "auto", "--layers auto"),
            (self.apply_chat_template is not None, "--apply-chat-template"),
            (self.changes_template, "--chat-template, --chat-template-kwargs, --system-prompt"),
            (self.reduction not in (None, "mean", GRADIENT), f"--reduction {self.reduction}"),
        ):
            if wrong:
                raise ConfigError("only for pairs", where=where, hint="Give --describe with --against, or --pairs.")

    @property
    def sources(self) -> list[str]:
        """Return the options that contain the data of the attribute; without any, the list is built in."""
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
    """Build each attribute, write its file, and return its description."""
    assert settings.output_dir is not None
    from braces_cli.core.adapter.model import open_session
    from braces_cli.core.attributes.vector import save_attributes, with_steered_layers
    from braces_cli.core.attributes.words import check_file_name
    from braces_cli.core.files import check_apart, check_output_file, file_hash, output_lock
    from braces_cli.core.models.ffn import chosen_layers
    from braces_cli.core.models.hub import check_push, push

    builders = read_sources(settings)
    paths = {name: settings.output_dir / f"{check_file_name(name)}.safetensors" for name in builders}
    source = settings.pairs or settings.words_file or settings.examples
    data = None if source is None else file_hash(source, DataError)
    results = []
    with output_lock(*paths.values()), progress(settings.quiet) as report:
        for path in paths.values():
            check_output_file(path, settings.overwrite)
        if settings.push_to_hub is not None:
            check_push(settings.push_to_hub)
        session = open_session(settings.model, settings.adapter, settings)
        check_apart(settings.output_dir, session.base.name, session.folder)
        is_auto = settings.layers == "auto"
        layers = None if is_auto else chosen_layers(session.base.model, settings.layers)
        for name, build in builders.items():
            if settings.sources in (["--describe"], ["--pairs"]):
                which, chat = "auto" if is_auto else layers, settings.apply_chat_template
                attribute = build(session, name, report=report, layers=which, chat=chat)
            else:
                attribute = with_steered_layers(build(session, name, report=report), layers)
            save_attributes(paths[name], [attribute])
            one = replace(settings, attribute=(name,))
            write_settings(paths[name].with_suffix(f".{SETTINGS_FILE}"), one, base=session.base.digest, data=data)
            results.append({
                "attribute": attribute.name,
                "words": attribute.words,
                "examples": attribute.examples,
                "pooling": attribute.pooling,
                **attribute.provenance,
                "layers": len(attribute.layers),
                "steered_layers": attribute.effective_layers,
                "hidden_size": attribute.hidden.shape[-1],
                "path": str(paths[name]),
            })  # fmt: skip
    if settings.push_to_hub is not None:
        push(settings.output_dir, settings.push_to_hub, [path.name for path in paths.values()])
    return results


def read_sources(settings: AttributeBuildSettings) -> dict[str, partial[Any]]:
    """Return the function that builds each attribute, with its data: files are read before the model is loaded.

    Raises:
        ConfigError: an unknown attribute.
        DataError: a file that cannot be read.
    """
    from braces_cli.core.attributes import build
    from braces_cli.core.attributes.words import clean_words, read_words
    from braces_cli.data.dataset import read_pairs
    from braces_cli.data.rows import read_texts

    names = settings.attribute
    how: dict[str, Any] = {"pooling": settings.pooling, "reduction": settings.reduction}
    if settings.pairs is not None:
        found, place = read_pairs(settings.pairs), str(settings.pairs)
        known = sorted(name for name in found if name is not None)
        if not known and len(names) != 1:
            hint = "Give --attribute once, or name the attribute in every row."
            raise ConfigError(f"{len(names)} names for one attribute", where="--attribute", hint=hint)
        if known and None in found:
            hint = "Name the attribute in every row, or in none."
            raise ConfigError("some rows name their attribute and some do not", where=place, hint=hint)
        for name in names if known else ():
            if name not in found:
                raise ConfigError(f"no row of `{name}`", where=place, hint=f"The rows have {', '.join(known)}.")
        pairs = {name: found[name if known else None] for name in names or known}
        return {name: partial(build.attribute_from_pairs, pairs=each, **how) for name, each in pairs.items()}
    if settings.describe or settings.against:
        sides: dict[str, Any] = {"describe": settings.describe, "against": settings.against}
        build.check_descriptions(**sides)
        return {names[0]: partial(build.attribute_from_descriptions, **sides, **how)}
    if settings.examples is not None:
        texts = [text.strip() for text in read_texts(settings.examples)]
        return {names[0]: partial(build.attribute_from_texts, texts=texts, **how)}
    if settings.words_file is not None:
        return {names[0]: partial(build.build_attribute, words=read_words(settings.words_file), **how)}
    if settings.words is not None:
        words = clean_words(settings.words.split(","))
        if not words:
            raise ConfigError("no words", where="--words", hint="Give at least one word.")
        return {names[0]: partial(build.build_attribute, words=words, **how)}
    for name in names:
        if name not in built_in():
            where = "--describe, --pairs, --words, --words-file, --examples"
            raise ConfigError(f"no words for `{name}`", where=where, hint=f"Built-in lists: {', '.join(built_in())}.")
    return {name: partial(build.built_in_attribute, **how) for name in names}


def _list(settings: AttributeBuildSettings) -> None:
    """Print the attributes of the folder and of the adapter, and the built-in ones."""
    from braces_cli.core.attributes.files import list_attributes

    folder = settings.output_dir
    if folder is not None and not folder.is_dir():
        raise ConfigError("no such folder", where=str(folder), hint="Give a folder that attr-build wrote to.")
    adapter = None if settings.adapter is None else user_path(settings.adapter)
    if adapter is not None and not os.path.isfile(adapter / "adapter_config.json"):
        # Imports torch: only for adapters on the hub.
        from braces_cli.core.adapter.files import find_adapter

        adapter = find_adapter(str(settings.adapter)).folder
    rows = list_attributes(folder, adapter)
    if settings.json:
        print_json({"attributes": rows})
        return
    table = [_row(row) for row in rows]
    print_table("attributes", ["attribute", "from", "built from", "base"], table)


def _row(row: dict[str, Any]) -> list[Any]:
    words, provenance = row["words"], row["provenance"] or {}
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
    base = (
        None
        if row["path"] is None
        else f"{Path(row['base'] or 'unknown').name} ({row['layers']} x {row['hidden_size']})"
    )
    return [row["name"], row["source"], built, base]
