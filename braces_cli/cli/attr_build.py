"""`braces attr-build`: words or texts -> an attribute file."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from braces_cli.cli import options as o
from braces_cli.cli.console import print_json, print_pairs, progress, set_up
from braces_cli.core.utils.errors import ConfigError


class Pooling(StrEnum):
    mean = "mean"
    last = "last"
    max = "max"


def attr_build(
    ctx: typer.Context,
    attribute: Annotated[str | None, typer.Option("--attribute", help="Name of the attribute.")] = None,
    words: Annotated[str | None, typer.Option("--words", help="Its words, separated by commas.")] = None,
    words_file: Annotated[Path | None, typer.Option("--words-file", help="Its words, one a line.")] = None,
    examples: Annotated[
        Path | None,
        typer.Option("--examples", help="Texts in place of words: one a line, or a data file with `text`."),
    ] = None,
    pooling: Annotated[Pooling, typer.Option("--pooling", help="Over the tokens of each word or text.")] = Pooling.mean,
    output_dir: Annotated[
        Path | None,
        typer.Option("--output-dir", "--attributes", help="Folder of attribute files to add to, or to --list."),
    ] = None,
    list_them: Annotated[
        bool, typer.Option("--list", help="Show the attributes of --output-dir, of --adapter, and those built in.")
    ] = False,
    model: o.Model = None,
    adapter: o.AdapterName = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an attribute of the same name.")] = False,
    revision: o.Revision = None,
    device: o.Device = "auto",
    dtype: o.DtypeOption = o.Dtype.auto,
    device_map: o.DeviceMap = None,
    quantize: o.Quantize = None,
    trust_remote_code: o.TrustRemoteCode = False,
    config: o.Config = None,
    dry_run: o.DryRun = False,
    fmt: o.FormatOption = o.Format.table,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Build an attribute's hidden states from words or texts; with neither, from a built-in list (--list shows them).

    The file fits every dtype and quantisation of its base, and no other base.
    """
    set_up(quiet, debug)
    if dry_run:
        print_json({"settings": o.resolved(ctx)})
        return
    if list_them:
        from braces_cli.cli.attr_list import show_attributes

        show_attributes(output_dir, adapter, fmt is o.Format.json)
        return
    for name, value in (("--attribute", attribute), ("--output-dir", output_dir)):
        if not value:
            raise ConfigError("missing option", where=name, hint="See `braces attr-build --help`.")
    assert attribute is not None
    assert output_dir is not None

    from braces_cli.core.attributes.attribute import save_attributes
    from braces_cli.core.attributes.word_lists import check_name
    from braces_cli.core.session import open_session
    from braces_cli.core.utils.atomic_files import check_output_file

    path = output_dir / f"{check_name(attribute)}.safetensors"
    check_output_file(path, overwrite)
    build = _builder(attribute, words, words_file, examples)
    session = open_session(model, adapter, o.load_options(ctx))
    with progress(quiet) as report:
        built = build(session, report, pooling.value)
    save_attributes(path, [built])
    result = {
        "attribute": attribute,
        "words": built.words,
        "examples": built.examples,
        "pooling": built.pooling,
        "layers": len(built.layers),
        "hidden_size": built.hidden.shape[1],
        "path": str(path),
    }
    if fmt is o.Format.json:
        print_json(result)
    else:
        of = {"words": ", ".join(built.words)} if built.words else {"words": None}
        print_pairs("attribute written", {**result, **of, "examples": built.examples or None})


def _builder(attribute: str, words: str | None, words_file: Path | None, examples: Path | None) -> Any:
    """What builds the attribute from its source, which is read here, before the model is loaded."""
    given = {"--words": words, "--words-file": words_file, "--examples": examples}
    sources = [name for name, value in given.items() if value is not None]
    if len(sources) > 1:
        raise ConfigError("two sources of words", where=", ".join(sources), hint="Give one of them.")

    from braces_cli.core.attributes.attribute import attribute_from_texts, build_attribute, from_list

    if examples is not None:
        from braces_cli.data.texts import read_texts

        texts = [text.strip() for text in read_texts(examples)]
        return lambda session, report, pooling: attribute_from_texts(session, attribute, texts, report, pooling)
    chosen = _words(attribute, words, words_file)
    if chosen is None:
        return lambda session, report, pooling: from_list(session, attribute, report, pooling)
    return lambda session, report, pooling: build_attribute(session, attribute, chosen, report, pooling)


def _words(attribute: str, words: str | None, file: Path | None) -> list[str] | None:
    """The user's words; None stands for the built-in list of that name."""
    from braces_cli.core.attributes.word_lists import built_in, clean_words, read_words

    if words is not None:
        return clean_words(words.split(","), "--words")
    if file is not None:
        return read_words(file)
    lists = built_in()
    if attribute not in lists:
        hint = f"Built-in lists: {', '.join(lists)}."
        raise ConfigError(f"no words for `{attribute}`", where="--words, --words-file, --examples", hint=hint)
    return None
