"""Options of `braces train` that are about its rows, and what `--check` shows of them."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

import typer

from braces_cli.cli.console import print_json, print_pairs, print_table
from braces_cli.core.utils.errors import ConfigError


class Packing(StrEnum):
    auto = "auto"
    on = "on"
    off = "off"


Columns = Annotated[
    list[str] | None,
    typer.Option("--columns", help="KEY=COLUMN,..., such as prompt=question,completion=answer. Repeatable."),
]
Streaming = Annotated[
    bool, typer.Option("--streaming", help="Read rows while training (sets larger than memory); needs --max-steps.")
]
Check = Annotated[
    bool, typer.Option("--check", help="Read and tokenise all rows, show what they come to, and stop. No weights.")
]
PackingOption = Annotated[
    Packing, typer.Option("--packing", help="Several examples a row: where a probe allows it, always, or never.")
]


def settle_columns(ctx: typer.Context) -> Any:
    """The `Columns` that `--columns` names; `attribute` and `strength` become the options of their own.

    Raises:
        ConfigError: they are named there and by their own options, differently.
    """
    from braces_cli.data.row_formats import parse_columns

    found = parse_columns(ctx.params["columns"] or ())
    for key, name in (("attribute", "attribute_field"), ("strength", "strength_field")):
        column, option = getattr(found, key), name.replace("_", "-")
        if column is None:
            continue
        default = "strength" if key == "strength" else None
        if ctx.params[name] not in (default, column):
            hint = f"Leave out --{option}, or `{key}` of --columns."
            raise ConfigError(f"two columns for `{key}`: {column} and {ctx.params[name]}", where="--columns", hint=hint)
        ctx.params[name] = column
    if ctx.params["strength_field"] != "strength" and ctx.params["attribute_field"] is None:
        hint = "Name the column of each row's attribute with --attribute-field."
        raise ConfigError("a strength without an attribute", where="--strength-field", hint=hint)
    return found


def show_check(as_json: bool, sets: dict[str, Any]) -> None:
    """Print what `--check` found, by option name."""
    if as_json:
        print_json(sets)
        return
    for option, found in sets.items():
        if found is None:
            continue
        counts = {name: value for name, value in found.items() if not isinstance(value, (list, dict))}
        lengths = {f"length, {name}": value for name, value in found["lengths"].items()}
        print_pairs(option, {**counts, **lengths})
        most = max(bar["examples"] for bar in found["histogram"])
        bars = [
            [f"{bar['from']}-{bar['to']}", bar["examples"], "#" * -(-40 * bar["examples"] // most)]
            for bar in found["histogram"]
        ]
        print_table("tokens of an example", ["tokens", "examples", ""], bars)
        for kind in ("formats", "attributes"):
            if found[kind]:
                print_table(kind, ["", "rows"], found[kind].items())
        texts = [
            [shown["where"], "".join(f"[[{p['text']}]]" if p["scored"] else p["text"] for p in shown["parts"])]
            for shown in found["shown"]
        ]
        print_table("examples, double brackets around what is scored", ["row", "text"], texts)
