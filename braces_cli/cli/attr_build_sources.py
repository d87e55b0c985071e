"""What `braces attr-build` builds attributes from. Light at the top: no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from braces_cli.core.attributes.word_lists import GRADIENT, POOLINGS, REDUCTIONS, built_in
from braces_cli.core.utils.errors import ConfigError
from braces_cli.core.utils.settings import METHOD, Settings, option

# (session, report) -> Attribute.
Build = Callable[..., Any]


@dataclass(frozen=True, kw_only=True)
class AttributeSources(Settings):
    """What attributes are built from, and how."""

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


def builders(settings: AttributeSources) -> dict[str, Build]:
    """What builds each attribute of an open session; files are read here, before the model is loaded.

    Raises:
        ConfigError: no name, several sources, or options that do not go together.
        DataError: a file that cannot be read.
    """
    given = {
        "--describe": settings.describe or settings.against, "--pairs": settings.pairs, "--words": settings.words,
        "--words-file": settings.words_file, "--examples": settings.examples,
    }  # fmt: skip
    sources = [name for name, value in given.items() if value is not None and value != ()]
    if len(sources) > 1:
        raise ConfigError("two sources of one attribute", where=", ".join(sources), hint="Give one of them.")
    source = sources[0] if sources else None
    if not settings.attribute and source != "--pairs":
        raise ConfigError("missing option", where="--attribute", hint="See `braces attr-build --help`.")
    if source in ("--describe", "--pairs"):
        return _from_pairs(settings)
    if settings.layers == "auto":
        raise _needs_pairs("--layers auto")
    if settings.apply_chat_template is not None:
        raise _needs_pairs("--apply-chat-template")
    if settings.reduction not in (None, "mean", GRADIENT):
        raise _needs_pairs(f"--reduction {settings.reduction}")
    each = _from_words(settings, source)
    return {name: _with_layers(build, settings.layers) for name, build in each.items()}


def _needs_pairs(where: str) -> ConfigError:
    return ConfigError("this needs pairs", where=where, hint="Give --describe with --against, or --pairs.")


def _from_pairs(settings: AttributeSources) -> dict[str, Build]:
    """Builders of --describe and --pairs."""
    from braces_cli.core.attributes.descriptions import check_descriptions
    from braces_cli.core.attributes.pair_attributes import (
        PairReading,
        attribute_from_descriptions,
        attribute_from_pairs,
    )
    from braces_cli.data.contrast_rows import read_pairs

    def reading(session: Any) -> PairReading:
        layers = settings.layers if settings.layers == "auto" else _layers(session, settings.layers)
        return PairReading(settings.reduction, settings.pooling, layers, settings.apply_chat_template)

    if settings.pairs is None:
        name, one, other = _single(settings), settings.describe, settings.against
        check_descriptions(one, other)
        return {
            name: lambda session, report: attribute_from_descriptions(
                session, name, one, other, reading(session), report
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
            session, name, pairs, reading(session), report
        )
        for name, pairs in chosen.items()
    }


def _from_words(settings: AttributeSources, source: str | None) -> dict[str, Build]:
    """Builders of --words, --words-file, --examples and of built-in lists."""
    from braces_cli.core.attributes.attribute import attribute_from_texts, build_attribute, built_in_attribute
    from braces_cli.core.attributes.word_lists import clean_words, read_words

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
        from braces_cli.data.texts import read_texts

        texts = [text.strip() for text in read_texts(settings.examples)]
        return {name: lambda session, report: attribute_from_texts(session, name, texts, report, *how)}
    chosen = clean_words((settings.words or "").split(","))
    if settings.words_file is not None:
        chosen = read_words(settings.words_file)
    elif not chosen:
        raise ConfigError("no words", where="--words", hint="Give at least one word.")
    return {name: lambda session, report: build_attribute(session, name, chosen, report, *how)}


def _single(settings: AttributeSources) -> str:
    """The one name of an attribute that has one source."""
    if len(settings.attribute) != 1:
        hint = "Give --attribute once; several only for built-in lists and for rows that name their attribute."
        raise ConfigError(f"{len(settings.attribute)} names for one attribute", where="--attribute", hint=hint)
    return settings.attribute[0]


def _with_layers(build: Build, layers: str | None) -> Build:
    """The same attribute, pushed in the layers that are named."""
    if layers is None:
        return build

    def built(session: Any, report: Any) -> Any:
        from braces_cli.core.attributes.attribute import with_steered_layers

        return with_steered_layers(build(session, report), _layers(session, layers))

    return built


def _layers(session: Any, layers: str | None) -> list[int] | None:
    from braces_cli.core.models.layer_ranges import chosen_layers

    return chosen_layers(session.base.model, layers)
