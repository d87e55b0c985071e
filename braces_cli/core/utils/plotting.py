"""Pictures as PNG files, drawn without a screen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from braces_cli.core.utils.atomic_files import write_atomic

_PNG = b"\x89PNG\r\n\x1a\n"


def figure(width: float, height: float) -> Any:
    """An empty matplotlib figure, sizes in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # No pyplot: it keeps figures alive and picks a screen where there is one. White, because black labels on the
    # transparent background that a matplotlibrc may ask for cannot be read on a dark page.
    created = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(created)
    return created


def save_figure(drawn: Any, path: Path) -> None:
    """Write a figure as PNG, whole or not at all."""
    write_atomic(
        path,
        lambda temporary: drawn.savefig(temporary, format="png", dpi=150, transparent=False),
        lambda temporary: temporary.read_bytes().startswith(_PNG),
    )


def plain_ticks(axis: Any, count: int = 6) -> None:
    """About `count` ticks on an axis, written as plain numbers; a logarithmic one may span less than a power of ten."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

    axis.set_major_locator(MaxNLocator(nbins=count, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def percent_ticks(axis: Any) -> None:
    """Shares from 0 to 1 written as per cent."""
    from matplotlib.ticker import PercentFormatter

    axis.set_major_formatter(PercentFormatter(1.0))


def plain_label(text: str) -> str:
    """A label that matplotlib does not read as a formula."""
    return text.replace("$", r"\$")
