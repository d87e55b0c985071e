"""`braces inspect values`: the tokens of value vectors, as a table, as JSON Lines or in a map file."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from braces_cli.cli.command import command
from braces_cli.cli.console import file_size, print_json, print_json_lines, print_pairs, print_table, progress
from braces_cli.cli.inspect_options import VectorSettings, tokens_cell
from braces_cli.cli.streams import note
from braces_cli.core.utils.settings import OUTPUT, option

# Rows of the table; JSON Lines have all of them.
SHOWN = 200


@dataclass(frozen=True, kw_only=True)
class ValuesSettings(VectorSettings):
    """Settings of `braces inspect values`."""

    first_options = ("model", "adapter", "layers", "index", "output")

    index: str | None = option(None, help="Vectors within each layer, such as 0-9,42. Default: all.")
    top_k: int = option(10, help="Number of tokens per vector.", min=1)
    output: Path | None = option(None, help="Map file to write, .parquet; `inspect find --map` searches it.")
    overwrite: bool = option(False, help="Overwrite an existing --output.", panel=OUTPUT)


@command
def values(settings: ValuesSettings) -> None:
    """The vocabulary tokens that each value vector promotes, best first.

    In a mixture of experts the index runs on from expert to expert.
    """
    from braces_cli.core.utils.output_lock import output_lock

    with output_lock(settings.output):
        _values(settings)


def _values(settings: ValuesSettings) -> None:
    if settings.output is not None:
        from braces_cli.core.utils.atomic_files import check_output_file
        from braces_cli.inspection.vocabulary_map import check_suffix

        check_suffix(settings.output, "--output")
        check_output_file(settings.output, settings.overwrite)
    with progress(settings.quiet) as report:
        session, rows = _rows(settings, report)
        if settings.output is not None:
            written = _write(session, settings, settings.output, rows)
            if settings.json:
                print_json(written)
            else:
                print_pairs("map written", {**written, "bytes": file_size(written["bytes"])}, {"bytes": "size"})
            return
        if settings.json:
            print_json_lines(rows)
            return
        shown = list(islice(rows, SHOWN + 1))
    table = [(row["layer"], row["index"], tokens_cell(row)) for row in shown[:SHOWN]]
    print_table("", ["layer", "index", "tokens"], table)
    if len(shown) > SHOWN:
        hint = "--format json or --output gives all, --layers and --index choose"
        note(f"the first {SHOWN} vectors; {hint}")


def _rows(settings: ValuesSettings, report: Any) -> tuple[Any, Iterator[dict[str, Any]]]:
    """The open session, and a row for each vector."""
    from braces_cli.core.models.layer_ranges import chosen_layers, parse_ranges
    from braces_cli.core.session import open_session
    from braces_cli.inspection.vector_tokens import value_tokens

    session = open_session(settings.model, settings.adapter, settings.load_options)
    layers = chosen_layers(session.base.model, settings.layers)
    width = max((ffn.value_vectors for ffn in session.ffns if layers is None or ffn.layer in layers), default=0)
    indices = parse_ranges(settings.index, width, "--index") if settings.index else None
    return session, value_tokens(session, layers, indices, settings.top_k, report, settings.side)


def _write(session: Any, settings: ValuesSettings, output: Path, rows: Iterator[dict[str, Any]]) -> dict[str, Any]:
    from braces_cli.inspection.vector_tokens import map_header
    from braces_cli.inspection.vocabulary_map import write_map

    header = map_header(session, settings.side, settings.top_k)
    count = write_map(output, header, rows)
    return {
        "output": str(output),
        "model": header["model"],
        "side": settings.side,
        "top_k": header["top_k"],
        "vectors": count,
        "bytes": output.stat().st_size,
    }
