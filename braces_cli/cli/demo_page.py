"""The page that `braces demo` leaves: what was run and what came out, in one file."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from braces_cli import __version__


def write_page(result: dict[str, Any], folder: Path) -> Path:
    """Write `index.html` into the demo's folder, the sweep's picture inside it; returns its path."""
    from braces_cli.core.utils.atomic_files import write_text
    from braces_cli.core.utils.html_pages import render_page

    picture = base64.b64encode((folder / "sweep.png").read_bytes()).decode("ascii")
    page = folder / "index.html"
    write_text(page, render_page("demo.html.j2", {**result, "picture": picture, "version": __version__}))
    return page
