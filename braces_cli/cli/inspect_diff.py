"""`braces inspect diff`: two models, or two adapters, side by side."""

from typing import Annotated

import typer

from braces_cli.cli import options as o
from braces_cli.cli.console import print_json, print_table, progress, set_up


def diff(
    ctx: typer.Context,
    a: Annotated[str, typer.Argument(metavar="A", help="Model or adapter: folder or hub id.")],
    b: Annotated[str, typer.Argument(metavar="B", help="The other one, of the same kind.")],
    adapters: Annotated[
        bool, typer.Option("--adapters", help="A and B are adapters; needed for hub ids, folders tell by themselves.")
    ] = False,
    revision: o.Revision = None,
    device: o.Device = "auto",
    dtype: o.DtypeOption = o.Dtype.auto,
    device_map: o.DeviceMap = None,
    quantize: o.Quantize = None,
    trust_remote_code: o.TrustRemoteCode = False,
    config: o.Config = None,
    fmt: o.FormatOption = o.Format.table,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """How alike two models are (share of vectors with the same best token) or two adapters (angles, gates)."""
    set_up(quiet, debug)
    with progress(quiet) as report:
        from braces_cli.inspection.diff import diff as run

        found = run(a, b, o.load_options(ctx), adapters=adapters, report=report)
    if fmt is o.Format.json:
        print_json(found)
        return
    rows = [
        {k: ", ".join(f"{x:.1f}" for x in v) if isinstance(v, list) else v for k, v in row.items()}
        for row in found["layers"]
    ]
    if found["same_top_token"] is None:
        title = f"A {a}\nB {b}\n{found['compared']} layers in both, angles in degrees"
    else:
        title = f"A {a}\nB {b}\n{found['same_top_token']:.1%} of {found['compared']:,} vectors have the same best token"
    columns = list(rows[0])
    print_table(title, [name.replace("_", " ") for name in columns], [list(row.values()) for row in rows])
