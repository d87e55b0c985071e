"""Pages that people open in a browser: self-contained HTML from the templates in `assets/pages`."""

from __future__ import annotations

from collections.abc import Callable
from importlib import resources
from typing import Any


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
