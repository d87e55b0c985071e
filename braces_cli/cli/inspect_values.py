"""`braces inspect values`: the tokens of value vectors, on the screen, as JSON Lines or into a map file."""

from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

from braces_cli.cli import options as o
from braces_cli.cli.console import print_json, print_json_lines, print_pairs, print_table, progress, set_up

SHOWN = 200  # rows of a table on a screen; JSON Lines carry all


def values(
    ctx: typer.Context,
    model: o.Model = None,
    adapter: o.AdapterName = None,
    side: Annotated[
        str,
        typer.Option("--side", help="value: what neurons write. gate, up: what they read from the residual stream."),
    ] = "value",
    layers: o.Layers = None,
    index: Annotated[
        str | None, typer.Option("--index", help="Value vectors within each layer, such as 0-9,42. Default: all.")
    ] = None,
    top_k: Annotated[int, typer.Option("--top-k", min=1, help="Tokens for each vector.")] = 10,
    output: Annotated[
        Path | None,
        typer.Option("--output", help="Map file to write, .parquet or .jsonl; `inspect find --map` searches it."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an --output that exists.")] = False,
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
    """The vocabulary tokens that each value vector promotes, best first.

    In a mixture of experts the index runs on from expert to expert.
    """
    set_up(quiet, debug)
    if output is not None:
        from braces_cli.core.utils.atomic_files import check_output_file
        from braces_cli.inspection.vocabulary_map import check_suffix

        check_suffix(output, "--output")
        check_output_file(output, overwrite)
    with progress(quiet) as report:
        session, rows = _rows(ctx, layers, index, top_k, side, report)
        if output is not None:
            written = _write(session, output, side, top_k, rows)
            (print_json if fmt is o.Format.json else lambda found: print_pairs("", found))(written)
            return
        if fmt is o.Format.json:
            print_json_lines(rows)
            return
        shown = list(islice(rows, SHOWN + 1))
    print_table("", ["layer", "index", "tokens"], [(r["layer"], r["index"], tokens(r)) for r in shown[:SHOWN]])
    if len(shown) > SHOWN:
        hint = "--format json or --output gives all, --layers and --index choose"
        typer.echo(f"the first {SHOWN} vectors; {hint}", err=True)


def tokens(row: Any) -> str:
    """Tokens of a row in one cell, quoted so that spaces and newlines show."""
    return "  ".join(repr(token["token"])[1:-1] for token in row["tokens"])


def _rows(ctx: typer.Context, layers: str | None, index: str | None, top_k: int, side: str, report: Any) -> Any:
    from braces_cli.core.models.layer_ranges import chosen_layers, parse_ranges
    from braces_cli.core.session import open_session
    from braces_cli.inspection.ffn_weights import check_side
    from braces_cli.inspection.vector_tokens import value_tokens

    check_side(side)
    params = ctx.params
    session = open_session(params["model"], params["adapter"], o.load_options(ctx))
    chosen = chosen_layers(session.base.model, layers)
    width = max((ffn.value_vectors for ffn in session.ffns if chosen is None or ffn.layer in chosen), default=0)
    wanted = parse_ranges(index, width, "--index") if index else None
    return session, value_tokens(session, chosen, wanted, top_k, report, side)


def _write(session: Any, output: Path, side: str, top_k: int, rows: Any) -> dict[str, Any]:
    from braces_cli.inspection.vector_tokens import map_header
    from braces_cli.inspection.vocabulary_map import write_map

    header = map_header(session, side, top_k)
    count = write_map(output, header, rows)
    return {
        "output": str(output),
        "model": header["model"],
        "side": side,
        "top_k": header["top_k"],
        "vectors": count,
        "bytes": output.stat().st_size,
    }
