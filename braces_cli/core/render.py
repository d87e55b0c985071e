"""Text files from the templates in `assets`, and plots as PNG files."""

from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

from braces_cli.core.files import write_atomic
from braces_cli.core.text import markdown_text, public_name


def render(name: str, data: dict[str, Any], **filters: Callable[[Any], Any]) -> str:
    """Fill the template `name`, such as `pages/demo.html.j2`, with `data`.

    A missing value is an error. Every value is escaped in HTML; Markdown templates call the filters `text` and `code`.
    """
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    folder = resources.files("braces_cli.assets")
    environment = Environment(
        loader=FunctionLoader(lambda path: (folder / path).read_text(encoding="utf-8")),
        autoescape=name.endswith(".html.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"text": markdown_text, "name": public_name} | filters
    return environment.get_template(name).render(data)


def figure(width: float, height: float) -> Any:
    """Return an empty matplotlib figure; sizes in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Not pyplot, which keeps figures in memory and opens a display. White: a matplotlibrc may set a transparent
    # background, on which black labels are not readable on a dark page.
    created = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(created)
    return created


def save_figure(drawn: Any, path: Path) -> None:
    """Write a figure as a PNG file atomically."""
    write_atomic(path, lambda temporary: drawn.savefig(temporary, format="png", dpi=150, transparent=False))


def plain_ticks(axis: Any) -> None:
    """Set about six ticks with plain numbers; a logarithmic axis may span less than a power of ten."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

    axis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def percent_ticks(axis: Any) -> None:
    """Format fractions from 0 to 1 as per cent."""
    from matplotlib.ticker import PercentFormatter

    axis.set_major_formatter(PercentFormatter(1.0))


def plain_label(text: str) -> str:
    """Escape `$`, which starts a formula in matplotlib."""
    return text.replace("$", r"\$")
