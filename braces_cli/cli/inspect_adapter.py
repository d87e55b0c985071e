"""`braces inspect`: the summary, and what its subcommands show."""

from itertools import islice
from typing import Annotated, Any

import typer

from braces_cli.cli import options as o
from braces_cli.cli.render import print_json, print_json_lines, print_table, progress, set_up
from braces_cli.core.errors import ConfigError

app = typer.Typer(help="Look inside a model and its adapter.", invoke_without_command=True)

_SHOWN = 200  # rows of a table on a screen; JSON Lines carry all


@app.callback()
def summary(
    ctx: typer.Context,
    model: o.Model = None,
    adapter: o.AdapterName = None,
    revision: o.Revision = None,
    trust_remote_code: o.TrustRemoteCode = False,
    config: o.Config = None,
    fmt: o.FormatOption = o.Format.table,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Look inside. Without a subcommand: gates and projections, layer by layer; needs no weights of the base."""
    if ctx.invoked_subcommand is not None:
        if model or adapter:
            hint = f"Write braces inspect {ctx.invoked_subcommand} --model ... --adapter ..."
            raise ConfigError(
                "options stand before the subcommand", where=f"inspect {ctx.invoked_subcommand}", hint=hint
            )
        return
    set_up(quiet, debug)
    from braces_cli.inspection.summary import summarise

    found = summarise(model, adapter, revision=revision, trust_remote_code=trust_remote_code)
    if fmt is o.Format.json:
        print_json(found)
        return
    title = f"{found['model']}, {found['base_parameters']:,} parameters"
    if adapter:
        title += f"\nadapter {adapter}, {found['parameters']:,} parameters"
    columns = list(found["layers"][0])
    print_table(title, [name.replace("_", " ") for name in columns], [layer.values() for layer in found["layers"]])


@app.command("values")
def values(
    ctx: typer.Context,
    model: o.Model = None,
    adapter: o.AdapterName = None,
    layers: o.Layers = None,
    index: Annotated[
        str | None, typer.Option("--index", help="Value vectors within each layer, such as 0-9,42. Default: all.")
    ] = None,
    top_k: Annotated[int, typer.Option("--top-k", min=1, help="Tokens for each vector.")] = 10,
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
    """The vocabulary tokens that each value vector promotes, best first."""
    set_up(quiet, debug)
    with progress(quiet) as report:
        rows = _values(ctx, layers, index, top_k, report)
        if fmt is o.Format.json:
            print_json_lines(rows)
            return
        shown = list(islice(rows, _SHOWN + 1))
    table = [(r["layer"], r["index"], "  ".join(repr(t["token"])[1:-1] for t in r["tokens"])) for r in shown[:_SHOWN]]
    print_table("", ["layer", "index", "tokens"], table)
    if len(shown) > _SHOWN:
        typer.echo(f"the first {_SHOWN} vectors; --format json gives all, --layers and --index choose", err=True)


def _values(ctx: typer.Context, layers: str | None, index: str | None, top_k: int, report: Any) -> Any:
    from braces_cli.core.ffn import chosen_layers, parse_ranges
    from braces_cli.core.session import open_session
    from braces_cli.inspection.values import value_tokens

    params = ctx.params
    session = open_session(params["model"], params["adapter"], o.load_options(ctx))
    chosen = chosen_layers(session.base.model, layers)
    width = max(ffn.value_vectors for ffn in session.ffns if chosen is None or ffn.layer in chosen)
    wanted = parse_ranges(index, width, "--index") if index else None
    yield from value_tokens(session, chosen, wanted, min(top_k, _vocabulary(session)), report)


def _vocabulary(session: Any) -> int:
    return int(session.base.model.get_output_embeddings().weight.shape[0])
