"""`braces attr-build`: words -> an attribute file."""

from pathlib import Path
from typing import Annotated

import typer

from braces_cli.cli import options as o
from braces_cli.cli.render import print_json, print_pairs, progress, set_up
from braces_cli.core.errors import ConfigError


def attr_build(
    ctx: typer.Context,
    attribute: Annotated[str | None, typer.Option("--attribute", help="Name of the attribute.")] = None,
    words: Annotated[str | None, typer.Option("--words", help="Its words, separated by commas.")] = None,
    words_file: Annotated[Path | None, typer.Option("--words-file", help="Its words, one a line.")] = None,
    output_dir: Annotated[
        Path | None, typer.Option("--output-dir", help="Folder of attribute files to add to.")
    ] = None,
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
    """Build an attribute's hidden states from words; without words, from a built-in list (positive, negative)."""
    set_up(quiet, debug)
    if dry_run:
        print_json({"settings": o.resolved(ctx)})
        return
    for name, value in (("--attribute", attribute), ("--output-dir", output_dir)):
        if not value:
            raise ConfigError("missing option", where=name, hint="See `braces attr-build --help`.")
    assert attribute is not None
    assert output_dir is not None

    from braces_cli.core.attributes import build_attribute, check_name, save_attributes
    from braces_cli.core.files import check_output_file
    from braces_cli.core.session import open_session

    path = output_dir / f"{check_name(attribute)}.safetensors"
    check_output_file(path, overwrite)
    chosen = _words(attribute, words, words_file)
    session = open_session(model, adapter, o.load_options(ctx))
    with progress(quiet) as report:
        built = build_attribute(session, attribute, chosen, report)
    save_attributes(path, [built])
    result = {
        "attribute": attribute,
        "words": built.words,
        "layers": len(built.layers),
        "hidden_size": built.hidden.shape[1],
        "path": str(path),
    }
    if fmt is o.Format.json:
        print_json(result)
    else:
        print_pairs("attribute written", {**result, "words": ", ".join(built.words)})


def _words(attribute: str, words: str | None, file: Path | None) -> list[str]:
    from braces_cli.core.attributes import built_in, clean_words, read_words

    if words is not None and file is not None:
        raise ConfigError("two sources of words", where="--words, --words-file", hint="Give one of them.")
    if words is not None:
        return clean_words(words.split(","), "--words")
    if file is not None:
        return read_words(file)
    lists = built_in()
    if attribute not in lists:
        hint = f"Built-in lists: {', '.join(lists)}."
        raise ConfigError(f"no words for `{attribute}`", where="--words, --words-file", hint=hint)
    return lists[attribute]
