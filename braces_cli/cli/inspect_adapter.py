"""`braces inspect`: the summary, and what its subcommands show."""

import functools
from dataclasses import dataclass
from typing import Any

import typer

from braces_cli.cli import inspect_clamp, inspect_find, inspect_report, inspect_trace, inspect_values
from braces_cli.cli.command import command
from braces_cli.cli.console import print_json, print_table
from braces_cli.cli.options import AdapterSettings, DisplaySettings
from braces_cli.core.utils.errors import ConfigError
from braces_cli.core.utils.settings import same_option

app = typer.Typer(help="Inspect a model and its adapter.", invoke_without_command=True)


@dataclass(frozen=True, kw_only=True)
class SummarySettings(DisplaySettings):
    """Settings of `braces inspect` without a subcommand, which loads no weights."""

    first_options = ("model", "adapter")

    model: str | None = same_option(AdapterSettings, "model")
    adapter: str | None = same_option(AdapterSettings, "adapter")
    revision: str | None = same_option(AdapterSettings, "revision")
    trust_remote_code: bool = same_option(AdapterSettings, "trust_remote_code")


@command
def summary(settings: SummarySettings) -> None:
    """Look inside. Without a subcommand: gates and projections, layer by layer; needs no weights of the base."""
    from braces_cli.inspection.adapter_summary import summarise

    found = summarise(
        settings.model,
        settings.adapter,
        revision=settings.revision,
        trust_remote_code=settings.trust_remote_code,
    )
    if settings.json:
        print_json(found)
        return
    title = [f"{found['model']}, {found['base_parameters']:,} parameters"]
    if settings.adapter:
        title.append(f"adapter {settings.adapter}, {found['parameters']:,} parameters")
    columns = list(found["layers"][0])
    rows = [
        [", ".join(f"{c:.3f}" for c in value) if isinstance(value, list) else value for value in layer.values()]
        for layer in found["layers"]
    ]
    print_table(title, [name.replace("_", " ") for name in columns], rows)


@app.callback()
@functools.wraps(summary)
def summary_or_subcommand(ctx: typer.Context, **values: Any) -> None:
    """The summary, unless a subcommand follows.

    Raises:
        ConfigError: a subcommand follows, but options stand before it.
    """
    if ctx.invoked_subcommand is None:
        summary(ctx=ctx, **values)
    elif values["model"] or values["adapter"]:
        hint = f"Write braces inspect {ctx.invoked_subcommand} --model ... --adapter ..."
        raise ConfigError("options stand before the subcommand", where=f"inspect {ctx.invoked_subcommand}", hint=hint)


app.command("values")(inspect_values.values)
app.command("find")(inspect_find.find)
app.command("trace")(inspect_trace.trace)
app.command("clamp")(inspect_clamp.clamp)
app.command("report")(inspect_report.report)
