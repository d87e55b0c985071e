"""`braces inspect find`: the vectors that promote a concept most, from a model or from a saved map.

From a map nothing heavy is imported, so that the answer is there at once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from braces_cli.cli.command import command
from braces_cli.cli.console import print_json_lines, print_table, progress
from braces_cli.cli.inspect_options import VectorSettings, tokens_cell
from braces_cli.core.attributes.listing import check_attributes
from braces_cli.core.attributes.word_lists import built_in
from braces_cli.core.utils.errors import ConfigError
from braces_cli.core.utils.settings import ATTRIBUTES, option


@dataclass(frozen=True, kw_only=True)
class FindSettings(VectorSettings):
    """Settings of `braces inspect find`."""

    first_options = ("model", "adapter", "attribute", "map_file", "limit")

    words: tuple[str, ...] = option(
        (), help="A word, several of one concept, or id:NUMBER.", metavar="TOKEN_OR_WORD", argument=True
    )
    attribute: str | None = option(
        None,
        help="Attribute: rank the vectors by relevance to this attribute instead of words.",
        metavar="NAME",
        complete=built_in,
    )
    attributes: Path | None = option(None, help="Folder with attribute files written by attr-build.", panel=ATTRIBUTES)
    map_file: Path | None = option(
        None,
        help="Map file written by `inspect values --output`, which fixes --side; needs no model.",
        flag="--map",
    )
    limit: int = option(20, help="Number of vectors to show.", min=1)
    top_k: int = option(10, help="Number of tokens per vector.", min=1)


@command
def find(settings: FindSettings) -> None:
    """The vectors that promote a concept most, best first: by rank among all tokens, then by score.

    A word counts in every spelling that is one token: with and without a space in front, and capitalised. A word of
    several tokens has the mean of its tokens' ranks and scores, a concept of several words the mean of theirs. From a
    map only vectors are found that list one of the tokens.
    """
    if bool(settings.words) == bool(settings.attribute):
        raise ConfigError("give words or --attribute, one of them", where="find", hint="Such as: find happy joyful")
    if settings.attributes is not None and settings.attribute is None:
        raise ConfigError("no attribute is looked for", where="--attributes", hint="Give --attribute NAME with it.")
    check_attributes(settings.attributes)
    if settings.attribute and settings.map_file:
        hint = "Relevance needs the model: leave --map out."
        raise ConfigError("an attribute cannot be found in a map", where="--map", hint=hint)
    if settings.map_file is not None:
        rows = _from_map(settings, settings.map_file)
    else:
        with progress(settings.quiet) as report:
            rows = _from_model(settings, report)
    rows = [row | {"tokens": row["tokens"][: settings.top_k]} for row in rows]
    if settings.json:
        print_json_lines(rows)
        return
    table = [(row["layer"], row["index"], row.get("rank"), row["score"], tokens_cell(row)) for row in rows]
    print_table("", ["layer", "index", "rank", "score", "tokens"], table)


def _from_map(settings: FindSettings, path: Path) -> list[dict[str, Any]]:
    from braces_cli.inspection.concept_tokens import concept
    from braces_cli.inspection.vocabulary_map import open_map, search, splitter

    source = open_map(path)
    split: Callable[[str], Sequence[int]] = splitter(source)
    if settings.model or settings.adapter:
        split = _checked_against_model(settings, source)
    layers = None
    if settings.layers is not None:
        from braces_cli.core.models.layer_ranges import parse_ranges

        layers = parse_ranges(settings.layers, int(source.header["fingerprint"]["layers"]), "--layers")
    requested = concept(list(settings.words), source.vocabulary(), split)
    return search(source, requested, settings.limit, layers)


def _checked_against_model(settings: FindSettings, source: Any) -> Callable[[str], Sequence[int]]:
    """How the named model splits words.

    Raises:
        ModelError: the map was made for another model.
    """
    from braces_cli.core.models.ffn import find_ffns
    from braces_cli.core.models.fingerprint import fingerprint
    from braces_cli.core.models.loading import checkpoint_folder, load_shape, load_tokenizer, tokenizer_hashes
    from braces_cli.core.models.tokenization import encode_word
    from braces_cli.core.session import base_name, resolve_adapter
    from braces_cli.inspection.vocabulary_map import check_model

    name = base_name(settings.model, resolve_adapter(settings.adapter))
    shape = load_shape(name, revision=settings.revision, trust_remote_code=settings.trust_remote_code)
    tokenizer = load_tokenizer(name, revision=settings.revision, trust_remote_code=settings.trust_remote_code)
    of_model = fingerprint(shape, find_ffns(shape), checkpoint_folder(name, settings.revision))
    check_model(source, of_model, tokenizer_hashes(tokenizer))
    return lambda word: encode_word(tokenizer, word)


def _from_model(settings: FindSettings, report: Any) -> list[dict[str, Any]]:
    from braces_cli.core.attributes.lookup import find_attribute
    from braces_cli.core.models.layer_ranges import chosen_layers
    from braces_cli.core.session import open_session
    from braces_cli.inspection.concept_search import (
        model_concept,
        top_vectors_for_attribute,
        top_vectors_for_concept,
    )

    if settings.attribute is not None and settings.side != "value":
        hint = "Relevance is of value vectors: leave --side out."
        raise ConfigError("an attribute has no other side", where="--side", hint=hint)
    session = open_session(settings.model, settings.adapter, settings.load_options)
    layers = chosen_layers(session.base.model, settings.layers)
    sizes: dict[str, Any] = {"layers": layers, "limit": settings.limit, "top_k": settings.top_k}
    if settings.attribute is not None:
        for_steering = session.adapter is None  # relevance through an adapter is that to p
        attribute = find_attribute(session, settings.attribute, settings.attributes, report, for_steering=for_steering)
        return top_vectors_for_attribute(session, attribute, **sizes)
    requested = model_concept(session, list(settings.words))
    return top_vectors_for_concept(session, requested, side=settings.side, report=report, **sizes)
