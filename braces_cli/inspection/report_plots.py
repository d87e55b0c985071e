"""Pictures of a report's data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from braces_cli.core.utils.plotting import figure, plain_label, save_figure
from braces_cli.inspection.report import visible


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
            save_figure(draw(data), path)
            written.append(path)
    return written


def _heat(data: dict[str, Any]) -> Any:
    heat = data["heat"]
    values = [[cell["effect"] for cell in row["cells"]] for row in heat["layers"]]
    drawn = figure(max(5.0, 0.45 * len(heat["tokens"]) + 2), max(3.0, 0.3 * len(values) + 2))
    axes = drawn.add_subplot()
    limit = heat["largest"]
    image = axes.imshow(values, cmap="coolwarm", vmin=-limit, vmax=limit, origin="lower", aspect="auto")
    axes.set_xticks(
        range(len(heat["tokens"])), [plain_label(visible(t)) for t in heat["tokens"]], rotation=60, ha="right"
    )
    axes.set_yticks(range(len(values)), [str(row["layer"]) for row in heat["layers"]])
    axes.set_ylabel("layer")
    drawn.colorbar(image, label="direct effect on the logit")
    return drawn


def _gates(data: dict[str, Any]) -> Any:
    drawn = figure(6, 3.5)
    axes = drawn.add_subplot()
    axes.bar([row["layer"] for row in data["gates"]], [row["gate"] for row in data["gates"]])
    axes.set_xlabel("layer")
    axes.set_ylabel("gate g")
    return drawn


def _alignments(data: dict[str, Any]) -> Any:
    drawn = figure(6, 3.5)
    axes = drawn.add_subplot()
    for attribute in data["attributes"]:
        rows = [row for row in attribute["layers"] if row["alignment"] is not None]
        axes.plot(
            [r["layer"] for r in rows], [r["alignment"] for r in rows], marker="o", label=plain_label(attribute["name"])
        )
    axes.plot([r["layer"] for r in rows], [r["chance"] for r in rows], linestyle=":", color="gray", label="chance")
    axes.set_xlabel("layer")
    axes.set_ylabel("share of the direction seen")
    axes.legend()
    return drawn
