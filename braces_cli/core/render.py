"""Pages that people open in a browser: self-contained HTML from the templates in `assets/pages`.

Text files made from the templates in `assets`: model cards, modelling files.

Pictures as PNG files, drawn without a screen.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

from braces_cli.core import markdown
from braces_cli.core.files import write_atomic


def render_page(name: str, data: dict[str, Any], **filters: Callable[[Any], Any]) -> str:
    """The template `name` filled with `data`; every value is escaped, and a missing one is an error."""
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    folder = resources.files("braces_cli.assets") / "pages"
    environment = Environment(
        loader=FunctionLoader(lambda page: (folder / page).read_text(encoding="utf-8")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= filters
    return environment.get_template(name).render(data)


def render(name: str, data: dict[str, Any]) -> str:
    """The template `name`, such as `export/lora_card.md.j2`, filled with `data`; a missing value is an error."""
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    folder = resources.files("braces_cli.assets")
    environment = Environment(
        loader=FunctionLoader(lambda path: (folder / path).read_text(encoding="utf-8")),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    # For Markdown; a modelling file has no need of them.
    environment.filters |= {"text": markdown.text, "code": markdown.code, "name": markdown.name}
    return environment.get_template(name).render(data)


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


def plain_ticks(axis: Any) -> None:
    """About six ticks on an axis, written as plain numbers; a logarithmic one may span less than a power of ten."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

    axis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def percent_ticks(axis: Any) -> None:
    """Shares from 0 to 1 written as per cent."""
    from matplotlib.ticker import PercentFormatter

    axis.set_major_formatter(PercentFormatter(1.0))


def plain_label(text: str) -> str:
    """A label that matplotlib does not read as a formula."""
    return text.replace("$", r"\$")
