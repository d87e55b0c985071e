"""Pictures of a report's data. matplotlib comes with the extra `plot`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from braces_cli.core.errors import ConfigError
from braces_cli.core.files import _write
from braces_cli.inspection.report import visible


def check_plot() -> None:
    """Raises:
    ConfigError: matplotlib is not installed.
    """
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        hint = 'pip install "braces-cli[plot]"'
        raise ConfigError("pictures need matplotlib", where="--plot", hint=hint)


def plot(data: dict[str, Any], folder: Path) -> list[Path]:
    """Write `heatmap.png`, `gates.png` and `alignments.png` into `folder`, those for which there is data."""
    written = []
    for name, draw, there in (
        ("heatmap", _heat, "reason" not in data["heat"]),
        ("gates", _gates, bool(data["gates"])),
        ("alignments", _alignments, data["adapter"] is not None),
    ):
        if there:
            path = folder / f"{name}.png"
            _save(draw(data), path)
            written.append(path)
    return written


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # No pyplot: it keeps figures alive and picks a screen where there is one.
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, path: Path) -> None:
    def whole(temporary: Path) -> bool:
        return temporary.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"

    _write(path, lambda temporary: figure.savefig(temporary, format="png", dpi=150), whole)


def _plain(text: str) -> str:
    """A label that matplotlib does not read as a formula."""
    return text.replace("$", r"\$")


def _heat(data: dict[str, Any]) -> Any:
    heat = data["heat"]
    values = [[cell["effect"] for cell in row["cells"]] for row in heat["layers"]]
    figure = _figure(max(5.0, 0.45 * len(heat["tokens"]) + 2), max(3.0, 0.3 * len(values) + 2))
    axes = figure.add_subplot()
    limit = heat["largest"]
    image = axes.imshow(values, cmap="coolwarm", vmin=-limit, vmax=limit, origin="lower", aspect="auto")
    axes.set_xticks(range(len(heat["tokens"])), [_plain(visible(t)) for t in heat["tokens"]], rotation=60, ha="right")
    axes.set_yticks(range(len(values)), [str(row["layer"]) for row in heat["layers"]])
    axes.set_ylabel("layer")
    figure.colorbar(image, label="direct effect on the logit")
    return figure


def _gates(data: dict[str, Any]) -> Any:
    figure = _figure(6, 3.5)
    axes = figure.add_subplot()
    axes.bar([row["layer"] for row in data["gates"]], [row["gate"] for row in data["gates"]])
    axes.set_xlabel("layer")
    axes.set_ylabel("gate g")
    return figure


def _alignments(data: dict[str, Any]) -> Any:
    figure = _figure(6, 3.5)
    axes = figure.add_subplot()
    for attribute in data["attributes"]:
        rows = [row for row in attribute["layers"] if row["alignment"] is not None]
        axes.plot(
            [r["layer"] for r in rows], [r["alignment"] for r in rows], marker="o", label=_plain(attribute["name"])
        )
    axes.plot([r["layer"] for r in rows], [r["chance"] for r in rows], linestyle=":", color="gray", label="chance")
    axes.set_xlabel("layer")
    axes.set_ylabel("share of the direction seen")
    axes.legend()
    return figure
