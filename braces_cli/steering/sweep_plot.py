"""The picture of a sweep: the share of texts with the attribute, and their perplexity, at each strength.

With baselines a third panel holds share against perplexity, a curve a method: at equal perplexity the outer one is
ahead.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from braces_cli.core.utils.plotting import figure, percent_ticks, plain_label, plain_ticks, save_figure
from braces_cli.steering.equal_perplexity import BRACES_METHOD


def plot_sweep(document: dict[str, Any], path: Path) -> None:
    """Draw a document of `braces steer --sweep` as PNG."""
    points = sorted(document["points"], key=lambda point: point["s"])
    baselines = document.get("baselines", [])
    drawn = figure(15 if baselines else 10, 4.6)
    base = Path(document["model"]).name
    texts = document["prompts"] * document["samples"]
    drawn.suptitle(plain_label(f"Steering {base} along {document['attribute']}: {texts} texts at each strength"))
    score, price, *both = drawn.subplots(1, 3 if baselines else 2)
    _line(score, points, "attribute_score")
    score.set_title(
        plain_label(f"Texts that are {document['label']}, according to {document['scorer']}"), fontsize="medium"
    )
    score.set_ylabel("share of texts")
    score.set_ylim(-0.02, 1.02)
    percent_ticks(score.yaxis)
    _line(price, points, "perplexity")
    price.set_yscale("log")
    plain_ticks(price.yaxis)
    price.set_title(
        plain_label(f"Perplexity under {document['reference_model'] or 'the unsteered model'}"), fontsize="medium"
    )
    price.set_ylabel("perplexity (log scale)")
    for axes, name in ((score, "attribute_score"), (price, "perplexity")):
        axes.set_xlabel("strength s")
        axes.axhline(document["unsteered"][name], color="gray", linestyle=":", label="without steering")
        if document["chosen"] is not None:
            chosen = document["chosen"]["s"]
            axes.axvline(chosen, color="gray", linestyle="--", label=f"suggested strength, s = {chosen:g}")
        axes.grid(alpha=0.3)
    if baselines:
        _compare(both[0], document, points)
    # One legend, below: both panels show the same four things, and inside it would hide points.
    drawn.legend(*price.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    save_figure(drawn, path)


def _line(axes: Any, points: list[dict[str, Any]], name: str) -> None:
    """A value at each strength, with its interval as an error bar."""
    axes.plot([point["s"] for point in points], [point[name] for point in points], marker="o", label="measured")
    known = [(point["s"], point[name], *point[f"{name}_interval"]) for point in points if point[f"{name}_interval"]]
    if known:
        strengths, middles, lows, highs = zip(*known, strict=True)
        # Rounding may put an end of the interval on the wrong side of the value by an ulp, which matplotlib refuses.
        below = [max(0.0, middle - low) for middle, low in zip(middles, lows, strict=True)]
        above = [max(0.0, high - middle) for middle, high in zip(middles, highs, strict=True)]
        axes.errorbar(
            strengths, middles, yerr=[below, above], fmt="none", ecolor="tab:blue", capsize=4, label="95 % interval"
        )


def _compare(axes: Any, document: dict[str, Any], points: list[dict[str, Any]]) -> None:
    """Share against perplexity of every method, each joined in the order of s through the unsteered point."""
    unsteered = {**document["unsteered"], "s": 0.0}
    for name, of_method in (
        (BRACES_METHOD, points),
        *((each["method"], each["points"]) for each in document["baselines"]),
    ):
        curve = sorted([*(each for each in of_method if each["s"] != 0), unsteered], key=lambda each: each["s"])
        places = [each["perplexity"] for each in curve], [each["attribute_score"] for each in curve]
        axes.plot(*places, marker="o", label=name)
    limit = 1.5 * unsteered["perplexity"]
    axes.axvline(limit, color="gray", linestyle=":", label="1.5 times the unsteered perplexity")
    axes.set_xscale("log")
    plain_ticks(axes.xaxis)
    percent_ticks(axes.yaxis)
    axes.set_xlabel("perplexity (log scale)")
    axes.set_ylabel("share of texts")
    axes.set_title("Share against perplexity", fontsize="medium")
    axes.legend(fontsize="small", frameon=False)
    axes.grid(alpha=0.3)
