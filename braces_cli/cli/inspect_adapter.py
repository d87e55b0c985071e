"""`braces inspect`: the summary, and what its subcommands show."""

import typer

from braces_cli.cli import inspect_clamp, inspect_diff, inspect_find, inspect_report, inspect_trace, inspect_values
from braces_cli.cli import options as o
from braces_cli.cli.console import print_json, print_table, set_up
from braces_cli.core.utils.errors import ConfigError

app = typer.Typer(help="Look inside a model and its adapter.", invoke_without_command=True)


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
    from braces_cli.inspection.adapter_summary import summarise

    found = summarise(model, adapter, revision=revision, trust_remote_code=trust_remote_code)
    if fmt is o.Format.json:
        print_json(found)
        return
    title = f"{found['model']}, {found['base_parameters']:,} parameters"
    if adapter:
        title += f"\nadapter {adapter}, {found['parameters']:,} parameters"
    columns = list(found["layers"][0])
    print_table(title, [name.replace("_", " ") for name in columns], [layer.values() for layer in found["layers"]])


app.command("values")(inspect_values.values)
app.command("find")(inspect_find.find)
app.command("trace")(inspect_trace.trace)
app.command("clamp")(inspect_clamp.clamp)
app.command("diff")(inspect_diff.diff)
app.command("report")(inspect_report.report)
