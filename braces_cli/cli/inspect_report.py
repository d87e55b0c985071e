"""`braces inspect report`: one self-contained page."""

from pathlib import Path
from typing import Annotated, Any

import typer

from braces_cli.cli import options as o
from braces_cli.cli.console import print_json, print_pairs, progress, set_up


def report(
    ctx: typer.Context,
    output: Annotated[Path, typer.Option("--output", help="HTML file to write.")],
    model: o.Model = None,
    adapter: o.AdapterName = None,
    prompt: Annotated[str | None, typer.Option("--prompt", help="For the heat map and the strongest vectors.")] = None,
    target: Annotated[
        str | None, typer.Option("--target", help="Token of the heat map. Default: the model's own next, everywhere.")
    ] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Folder for PNG versions.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an --output that exists.")] = False,
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
    """Write a page with gates, value vectors, a heat map of a prompt and attribute alignments; it needs no network."""
    set_up(quiet, debug)
    from braces_cli.core.utils.atomic_files import check_output_file, check_output_folder

    check_output_file(output, overwrite)
    if plot is not None:
        check_output_folder(plot, overwrite)
    with progress(quiet) as tell:
        written = _write(ctx, output, plot, tell)
    if fmt is o.Format.json:
        print_json(written)
        return
    print_pairs("", written | {"plots": ", ".join(written["plots"]) or None})


def _write(ctx: typer.Context, output: Path, folder: Path | None, tell: Any) -> dict[str, Any]:
    from braces_cli.core.session import open_session
    from braces_cli.core.utils.atomic_files import write_text
    from braces_cli.inspection.concept_search import vocabulary
    from braces_cli.inspection.report import DEFAULT_PROMPT, render, report_data
    from braces_cli.inspection.report_plots import plot

    params = ctx.params
    session = open_session(params["model"], params["adapter"], o.load_options(ctx))
    target = None if params["target"] is None else vocabulary(session).single(params["target"], "--target")
    prompt = DEFAULT_PROMPT if params["prompt"] is None else params["prompt"]
    data = report_data(session, prompt, target, tell)
    write_text(output, render(data))
    plots = [] if folder is None else plot(data, folder)
    return {
        "output": str(output),
        "model": session.base.name,
        "adapter": None if session.folder is None else str(session.folder),
        "bytes": output.stat().st_size,
        "plots": [str(path) for path in plots],
    }
