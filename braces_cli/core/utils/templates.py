"""Text files made from the templates in `assets`: model cards, modelling files."""

from __future__ import annotations

from importlib import resources
from typing import Any

from braces_cli.core.utils import markdown


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
