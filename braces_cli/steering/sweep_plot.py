"""The picture of a sweep: the attribute and the price in perplexity, over strength and against each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from braces_cli.core.utils.plotting import figure, plain_label, save_figure


def plot_sweep(document: dict[str, Any], path: Path) -> None:
    """Draw a document of `braces steer --sweep` as PNG."""
    points = sorted(document["points"], key=lambda point: point["s"])
    strengths = [point["s"] for point in points]
    drawn = figure(10, 4)
    score, price = drawn.subplots(1, 2)
    _line(score, strengths, [p["attribute_score"] for p in points], [p["attribute_score_interval"] for p in points])
    score.set_ylabel(plain_label(f"share of texts that are {document['label']} ({document['scorer']})"))
    score.set_ylim(0, 1)
    _line(price, strengths, [p["perplexity"] for p in points], [p["perplexity_interval"] for p in points])
    price.axhline(document["unsteered"]["perplexity"], color="gray", linestyle=":", label="unsteered")
    price.set_yscale("log")
    # Plain numbers on the axis, where it spans less than a power of ten, too.
    for axis in (price.yaxis.set_major_formatter, price.yaxis.set_minor_formatter):
        axis(lambda value, _: f"{value:g}")
    price.set_ylabel(plain_label(f"perplexity under {document['judge_model'] or 'the base'}"))
    price.legend()
    for axes in (score, price):
        axes.set_xlabel(plain_label(f"strength s of {document['attribute']}"))
        if document["chosen"] is not None:
            axes.axvline(document["chosen"]["s"], color="gray", linewidth=0.8, linestyle="--")
    save_figure(drawn, path)


def _line(axes: Any, x: list[float], y: list[float], intervals: list[Any]) -> None:
    axes.plot(x, y, marker="o")
    known = [(at, *interval) for at, interval in zip(x, intervals, strict=True) if interval is not None]
    if known:
        at, low, high = zip(*known, strict=True)
        axes.fill_between(at, low, high, alpha=0.2)
