"""Pictures as PNG files, drawn without a screen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from braces_cli.core.utils.atomic_files import write_whole

_PNG = b"\x89PNG\r\n\x1a\n"


def figure(width: float, height: float) -> Any:
    """An empty matplotlib figure, sizes in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # No pyplot: it keeps figures alive and picks a screen where there is one.
    made = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(made)
    return made


def save_figure(drawn: Any, path: Path) -> None:
    """Write a figure as PNG, whole or not at all."""
    write_whole(
        path,
        lambda temporary: drawn.savefig(temporary, format="png", dpi=150),
        lambda temporary: temporary.read_bytes().startswith(_PNG),
    )


def plain_label(text: str) -> str:
    """A label that matplotlib does not read as a formula."""
    return text.replace("$", r"\$")
