"""`braces inspect diff`: two models, or two adapters, side by side."""

from dataclasses import dataclass

from braces_cli.cli.command import command
from braces_cli.cli.console import print_json, print_table, progress
from braces_cli.cli.options import DisplaySettings
from braces_cli.core.models.load_options import LoadOptions
from braces_cli.core.utils.settings import option


@dataclass(frozen=True, kw_only=True)
class DiffSettings(LoadOptions, DisplaySettings):
    """Settings of `braces inspect diff`."""

    first_options = ("adapters",)

    a: str = option(help="Model or adapter: folder or hub id.", metavar="A", argument=True)
    b: str = option(help="The other one, of the same kind.", metavar="B", argument=True)
    adapters: bool = option(False, help="A and B are adapters; needed for hub ids, folders tell by themselves.")


@command
def diff(settings: DiffSettings) -> None:
    """How alike two models are (share of vectors with the same best token) or two adapters (angles, gates)."""
    a, b = settings.a, settings.b
    with progress(settings.quiet) as report:
        from braces_cli.inspection.diff import diff as run

        result = run(a, b, settings.shared(LoadOptions), adapters=settings.adapters, report=report)
    if settings.json:
        print_json(result)
        return
    rows = [
        {k: ", ".join(f"{x:.1f}" for x in v) if isinstance(v, list) else v for k, v in row.items()}
        for row in result["layers"]
    ]
    share, compared = result["same_top_token"], result["compared"]
    if share is None:
        what = f"{compared} layers in both, angles in degrees"
    else:
        what = f"{share:.1%} of {compared:,} vectors have the same best token"
    columns = list(rows[0])
    print_table(
        [f"A {a}", f"B {b}", what], [name.replace("_", " ") for name in columns], [list(row.values()) for row in rows]
    )
