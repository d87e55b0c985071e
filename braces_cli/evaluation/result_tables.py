"""An evaluation as rows of a table, as a Markdown page that says how to repeat it, and as a plot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from braces_cli.core.utils.markdown import text
from braces_cli.evaluation.comparison import significance_label

_HASH = 12
# Heading of `pair_table`.
PAIRS = "adapters among themselves"
# Heading of `slope_table`.
SLOPES = "slope over the strength s, mean over documents"


def main_table(result: dict[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows: for each metric a row a system, with its change against the first one."""
    systems = result["systems"]
    compared = {(c["task"], c["metric"], c["to"]): c for c in result["comparisons"] if c["from"] == systems[0]["name"]}
    columns = ["task", "metric", "n", "system", "value ± error"]
    if len(systems) > 1:
        columns += ["change", "p (Holm)", ""]
    rows: list[list[Any]] = []
    for task, metrics in systems[0]["results"].items():
        for metric in metrics:
            for system in systems:
                entry = system["results"][task][metric]
                row = [task, metric, entry["n"], system["name"], _with_error(entry)]
                if len(systems) > 1:
                    comparison = compared.get((task, metric, system["name"]))
                    row += _change(comparison) if comparison else ["", None, ""]
                rows.append(row)
    return columns, rows


def pair_table(result: dict[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """The comparisons without the first system: adapters among themselves, and each with itself steered."""
    first = result["systems"][0]["name"]
    columns = ["task", "metric", "from", "to", "change", "p (Holm)", ""]
    rows = [
        [c["task"], c["metric"], c["from"], c["to"], *_change(c)] for c in result["comparisons"] if c["from"] != first
    ]
    return columns, rows


def slope_table(result: dict[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """What a unit of s adds to each metric; no rows where nothing is steered."""
    rows = []
    for each in result.get("slopes", ()):
        low, high = each["slope_interval"] or (math.nan, math.nan)
        about = [each["task"], each["metric"], each["system"], each["attribute"]]
        rows.append([*about, each["slope"], f"{low:.2g} to {high:.2g}", each["negative"], each["n"]])
    return ["task", "metric", "system", "attribute", "slope", "95 %", "share falling", "n"], rows


def facts(result: dict[str, Any]) -> dict[str, str]:
    """What is needed to repeat the run: name -> value."""
    settings, systems = result["settings"], result["systems"]
    versions = settings["versions"]
    known: dict[str, Any] = {
        "model": systems[0]["model"],
        "revision": settings["revision"],
        "value matrices": _short(settings["fingerprint"]),
        "dtype": settings["dtype"],
        "quantize": settings["quantize"],
    }
    for system in systems:
        if system["adapter"] is not None and not system["attributes"]:
            known[f"adapter {system['name']}"] = f"{system['adapter']} ({system['method']}, {_short(system['sha256'])})"
    known["steered by"] = ", ".join(settings.get("attributes", ()))
    template = settings["tokenizer"]["chat_template"] if settings["apply_chat_template"] else None
    known |= {
        "chat template": _short(template) if template else "not applied",
        "limit": "all documents" if settings["limit"] is None else f"{settings['limit']} documents of each task",
        "few-shot examples": ", ".join(f"{task} {count}" for task, count in settings["num_fewshot_used"].items()),
        "task versions": ", ".join(f"{task} {number}" for task, number in settings["task_versions"].items()),
        "task data": ", ".join(f"{task} {_short(digest)}" for task, digest in settings["task_data_sha256"].items()),
        "seeds": ", ".join(f"{name} {number}" for name, number in settings["seeds"].items()),
        "versions": ", ".join(f"{name} {number}" for name, number in versions.items()),
    }
    return {name: str(value) for name, value in known.items() if value not in (None, "")}


def markdown(result: dict[str, Any]) -> str:
    """The page `results.md`."""
    lines = ["# Evaluation", "", *(f"- {text(name)}: {text(value)}" for name, value in facts(result).items()), ""]
    lines += _markdown_table(*main_table(result))
    level = result["settings"]["significance_level"]
    if result["comparisons"]:
        lines += [
            "",
            f"Value ± standard error. Exact McNemar test where a document scores 0 or 1, else paired bootstrap; p is"
            f" corrected for the number of tasks (Holm), significant below {level:g}.",
        ]
    columns, rows = pair_table(result)
    if rows:
        lines += ["", f"## {PAIRS.capitalize()}", "", *_markdown_table(columns, rows)]
    columns, rows = slope_table(result)
    if rows:
        lines += ["", f"## {SLOPES.capitalize()}", "", *_markdown_table(columns, rows)]
    if result.get("fail_under"):
        lines += ["", "## Thresholds", "", *(f"- {text(threshold_line(row))}" for row in result["fail_under"])]
    return "\n".join(lines) + "\n"


def threshold_line(row: dict[str, Any]) -> str:
    """One line that says whether a threshold is reached."""
    got = "was not measured" if row["value"] is None else f"is {row['value']:.4g}"
    reached = "reached" if row["reached"] else "not reached"
    return f"{row['system']}: {row['task']} {row['metric']} {got}, {row['threshold']:.4g} {reached}"


def draw(result: dict[str, Any], path: Path) -> None:
    """Write a picture: a panel a metric, a point a system with 1.96 standard errors."""
    from braces_cli.core.utils.plotting import figure, plain_label, save_figure

    systems = result["systems"]
    panels = [(task, metric) for task, metrics in systems[0]["results"].items() for metric in metrics]
    across = min(4, len(panels))
    down = -(-len(panels) // across)
    drawn = figure(3.0 * across, 0.9 * down + 0.35 * down * len(systems))
    for place, (task, metric) in enumerate(panels):
        axes = drawn.add_subplot(down, across, place + 1)
        for row, system in enumerate(systems):
            entry = system["results"][task][metric]
            if entry["value"] is None or not math.isfinite(entry["value"]):
                continue
            error = entry["stderr"]
            reach = 1.96 * error if error is not None and math.isfinite(error) else 0.0
            axes.errorbar(entry["value"], row, xerr=reach, fmt="o", color=f"C{row}", capsize=3)
        axes.set_yticks(range(len(systems)), [plain_label(system["name"]) for system in systems])
        axes.set_ylim(len(systems) - 0.5, -0.5)
        axes.set_title(plain_label(f"{task}, {metric}"), fontsize=8)
        axes.tick_params(labelsize=7)
        axes.grid(axis="x", alpha=0.3)
    save_figure(drawn, path)


def _markdown_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    def line(cells: Sequence[Any]) -> str:
        shown = ["-" if c is None else f"{c:.3g}" if isinstance(c, float) else str(c) for c in cells]
        return "| " + " | ".join(map(text, shown)) + " |"

    return [line(columns), "|" + " --- |" * len(columns), *map(line, rows)]


def _change(compared: dict[str, Any]) -> list[Any]:
    # What is not finite is null in a result that was read back.
    difference = compared["difference"]
    shown = None if difference is None else f"{difference:+.4g}"
    return [shown, compared["p_holm"], significance_label(compared)]


def _with_error(entry: dict[str, Any]) -> str:
    value, error = entry["value"], entry["stderr"]
    if value is None:
        return "not finite"
    return f"{value:.4g}" + ("" if error is None else f" ± {error:.2g}")


def _short(hashed: str | None) -> str | None:
    return None if hashed is None else hashed[:_HASH]
