"""`braces inspect find`: the vectors that promote a concept most, from a model or from a saved map.

From a map nothing heavy is imported, so that the answer is there at once.
"""

from pathlib import Path
from typing import Annotated, Any

import typer

from braces_cli.cli import options as o
from braces_cli.cli.console import print_json_lines, print_table, progress, set_up
from braces_cli.cli.inspect_values import tokens
from braces_cli.core.utils.errors import ConfigError


def find(
    ctx: typer.Context,
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[TOKEN_OR_WORDS]...", help="A word, several of one concept, or id:NUMBER."),
    ] = None,
    attribute: Annotated[
        str | None, typer.Option("--attribute", help="Instead of words: the vectors of highest relevance to it.")
    ] = None,
    attributes: Annotated[Path | None, typer.Option("--attributes", help="Folder that attr-build wrote.")] = None,
    map_file: Annotated[
        Path | None, typer.Option("--map", help="Map that `inspect values --output` wrote; needs no model.")
    ] = None,
    model: o.Model = None,
    adapter: o.AdapterName = None,
    side: Annotated[str, typer.Option("--side", help="value, gate or up; a map has its own.")] = "value",
    layers: o.Layers = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="Vectors to show.")] = 20,
    top_k: Annotated[int, typer.Option("--top-k", min=1, help="Tokens shown for each vector.")] = 10,
    revision: o.Revision = None,
    device: o.Device = "auto",
    dtype: o.DtypeOption = o.Dtype.auto,
    device_map: o.DeviceMap = None,
    quantize: o.Quantize = None,
    trust_remote_code: o.TrustRemoteCode = False,
    config: o.Config = None,
    fmt: Annotated[o.Format, typer.Option("--format", help="json is JSON Lines.")] = o.Format.table,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """The vectors that promote a concept most, best first: by rank among all tokens, then by score.

    A word counts in every spelling that is one token: with and without a space in front, and capitalised. A word of
    several tokens has the mean of its tokens' ranks and scores, a concept of several words the mean of theirs. From a
    map only vectors are found that list one of the tokens.
    """
    set_up(quiet, debug)
    if bool(words) == bool(attribute):
        raise ConfigError("give words or --attribute, one of them", where="find", hint="Such as: find happy joyful")
    if attribute and map_file:
        hint = "Relevance needs the model: leave --map out."
        raise ConfigError("an attribute cannot be found in a map", where="--map", hint=hint)
    if map_file is not None:
        rows = _from_map(ctx, map_file, list(words or ()))
    else:
        with progress(quiet) as report:
            rows = _from_model(ctx, list(words or ()), attribute, report)
    rows = [row | {"tokens": row["tokens"][:top_k]} for row in rows]
    if fmt is o.Format.json:
        print_json_lines(rows)
        return
    columns = ["layer", "index", "rank", "score", "tokens"]
    table = [(r["layer"], r["index"], r.get("rank"), r["score"], tokens(r)) for r in rows]
    print_table("", columns, table)


def _from_map(ctx: typer.Context, path: Path, words: list[str]) -> list[dict[str, Any]]:
    from braces_cli.inspection.concept_tokens import concept
    from braces_cli.inspection.vocabulary_map import open_map, search, splitter

    found, params = open_map(path), ctx.params
    split = splitter(found)
    if params["model"] or params["adapter"]:
        split = _held_to_model(ctx, found)
    layers = None
    if params["layers"] is not None:
        from braces_cli.core.models.layer_ranges import parse_ranges

        layers = parse_ranges(params["layers"], int(found.header["fingerprint"]["layers"]), "--layers")
    wanted = concept(words, found.vocabulary(), split)
    return search(found, wanted, params["limit"], layers)


def _held_to_model(ctx: typer.Context, found: Any) -> Any:
    """Refuse a map of another model than the one named; give that model's own way to split words."""
    from braces_cli.core.models.ffn import find_ffns
    from braces_cli.core.models.fingerprint import fingerprint
    from braces_cli.core.models.loading import checkpoint_folder, load_shape, load_tokenizer, tokenizer_hashes
    from braces_cli.core.models.tokenization import encode_word
    from braces_cli.core.session import base_name, resolve_adapter
    from braces_cli.inspection.vocabulary_map import check_model

    params = ctx.params
    name = base_name(params["model"], resolve_adapter(params["adapter"]))
    source = {"revision": params["revision"], "trust_remote_code": params["trust_remote_code"]}
    shape = load_shape(name, **source)
    tokenizer = load_tokenizer(name, **source)
    own = fingerprint(shape, find_ffns(shape), checkpoint_folder(name, params["revision"]))
    check_model(found, own, tokenizer_hashes(tokenizer))
    return lambda word: encode_word(tokenizer, word)


def _from_model(ctx: typer.Context, words: list[str], attribute: str | None, report: Any) -> list[dict[str, Any]]:
    from braces_cli.core.attributes.attribute import find_attribute
    from braces_cli.core.models.layer_ranges import chosen_layers
    from braces_cli.core.session import open_session
    from braces_cli.inspection.concept_search import model_concept, top_vectors_for_attribute, top_vectors_for_concept
    from braces_cli.inspection.ffn_weights import check_side

    params = ctx.params
    check_side(params["side"])
    session = open_session(params["model"], params["adapter"], o.load_options(ctx))
    layers = chosen_layers(session.base.model, params["layers"])
    sizes = {"layers": layers, "limit": params["limit"], "top_k": params["top_k"]}
    if attribute is not None:
        if params["side"] != "value":
            hint = "Relevance is of value vectors: leave --side out."
            raise ConfigError("an attribute has no other side", where="--side", hint=hint)
        return top_vectors_for_attribute(
            session, find_attribute(session, attribute, params["attributes"], report), **sizes
        )
    wanted = model_concept(session, words)
    return top_vectors_for_concept(session, wanted, side=params["side"], report=report, **sizes)
