"""`braces inspect report`: one self-contained page."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from braces_cli.cli.command import command
from braces_cli.cli.console import print_json, print_pairs, progress
from braces_cli.cli.inspect_options import InspectSettings
from braces_cli.core.utils.settings import OUTPUT, option


@dataclass(frozen=True, kw_only=True)
class ReportSettings(InspectSettings):
    """Settings of `braces inspect report`."""

    first_options = ("output", "prompt", "model", "adapter", "target")

    output: Path = option(help="HTML file to write.")
    prompt: str | None = option(None, help="Text for the heat map and the strongest vectors.")
    target: str | None = option(
        None, help="Target token of the heat map. Default: the model's next token at each position."
    )
    overwrite: bool = option(False, help="Overwrite an existing --output.", panel=OUTPUT)


@command
def report(settings: ReportSettings) -> None:
    """Write a page with gates, value vectors, a heat map of a prompt and attribute alignments; it needs no network."""
    from braces_cli.core.utils.atomic_files import check_output_file
    from braces_cli.core.utils.output_lock import output_lock

    with output_lock(settings.output), progress(settings.quiet) as on_progress:
        check_output_file(settings.output, settings.overwrite)
        written = _write(settings, on_progress)
    if settings.json:
        print_json(written)
        return
    print_pairs("", written)


def _write(settings: ReportSettings, on_progress: Any) -> dict[str, Any]:
    from braces_cli.core.session import open_session
    from braces_cli.core.utils.atomic_files import write_text
    from braces_cli.inspection.concept_search import vocabulary
    from braces_cli.inspection.report import DEFAULT_PROMPT, render, report_data

    session = open_session(settings.model, settings.adapter, settings.load_options)
    target = None if settings.target is None else vocabulary(session).single(settings.target, "--target")
    prompt = DEFAULT_PROMPT if settings.prompt is None else settings.prompt
    write_text(settings.output, render(report_data(session, prompt, target, on_progress)))
    return {
        "output": str(settings.output),
        "model": session.base.name,
        "adapter": None if session.folder is None else str(session.folder),
        "bytes": settings.output.stat().st_size,
    }
