"""Tables and Markdown page of an evaluation, tables and plot of a sweep.

The plot of a sweep shows the share of texts with the attribute and the perplexity at each strength and, with baselines,
share against perplexity, one curve per method.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from braces_cli.core.render import figure, percent_ticks, plain_label, plain_ticks, render, save_figure
from braces_cli.core.text import number
from braces_cli.evaluation.results import EMPTY, TRUNCATED
from braces_cli.evaluation.statistics import share_interval, significance_label
from braces_cli.evaluation.sweep import methods
from braces_cli.evaluation.text_tasks import RATINGS

_HASH = 12
# Fact -> key of the settings with a value for each task or library.
_LISTED = {
    "few-shot examples": "num_fewshot_used", "task versions": "task_versions", "task data": "task_data_sha256",
    "seeds": "seeds", "versions": "versions",
}  # fmt: skip
# Title, columns and rows of a table.
Table = tuple[str, Sequence[str], list[list[Any]]]


def result_tables(result: dict[str, Any]) -> list[Table]:
    """Return the tables of an evaluation; the second and third only if they have rows.

    The first has, for each metric, one row per system, with the difference from the first system. The second has the
    other comparisons: adapters with each other, and each with itself steered. The third has the slopes.
    """
    systems = result["systems"]
    compared = {(c["task"], c["metric"], c["from"], c["to"]): c for c in result["comparisons"]}
    change = ["change", "p (Holm)", "significance"]
    rows: list[list[Any]] = []
    for task, metrics in systems[0]["results"].items():
        for metric in metrics:
            entries = [system["results"][task][metric] for system in systems]
            is_shown = metric not in (EMPTY, TRUNCATED) or any(entry["value"] for entry in entries)
            for system, entry in zip(systems, entries, strict=True):
                comparison = compared.pop((task, metric, systems[0]["name"], system["name"]), None)
                changes = _change(comparison) if comparison else ["", None, ""]
                levels = [entry.get("chance"), entry.get("majority")]
                if is_shown:
                    rows.append([task, metric, entry["n"], system["name"], _with_error(entry), *levels, *changes])
    columns = ["task", "metric", "n", "system", "value ± error", "chance", "majority class", *change]
    pairs = [[*names, *_change(comparison)] for names, comparison in compared.items()]
    keys = ("task", "metric", "system", "attribute", "slope", "slope_interval", "negative", "n")
    slopes = [[_interval(each[key]) for key in keys] for each in result.get("slopes", ())]
    about = ["task", "metric", "system", "attribute", "slope", "95 %", "share falling", "n"]
    tables: list[Table] = [
        ("evaluation", columns, rows),
        ("adapters among themselves", ["task", "metric", "from", "to", *change], pairs),
        ("slope over the strength s, mean over documents", about, slopes),
    ]
    return [_without_constants(table) for table in tables if table[2] or table is tables[0]]


# Columns that can be the same in all rows.
_ABOUT = ("task", "metric", "n", "system", "chance", "majority class", "from", "to", "attribute")


def _without_constants(table: Table) -> Table:
    """Return the table without empty columns, and with values that all rows share in the title."""
    title, columns, rows = table
    cells = {column: [row[index] for row in rows] for index, column in enumerate(columns)}
    dropped = {column for column in cells if not any(cell not in (None, "") for cell in cells[column])}
    for column in set(_ABOUT) & set(columns) - dropped if len(rows) > 1 else ():
        if len(set(cells[column])) == 1:
            dropped.add(column)
    title += "".join(f", {each} {_cell(cells[each][0])}" for each in _ABOUT if each in dropped and any(cells[each]))
    left = [index for index, column in enumerate(columns) if column not in dropped]
    return title, [columns[index] for index in left], [[row[index] for index in left] for row in rows]


def facts(result: dict[str, Any]) -> dict[str, str]:
    """Return the settings that reproduce the run: name -> value."""
    settings, systems = result["settings"], result["systems"]
    known: dict[str, Any] = {
        "model": systems[0]["model"],
        "revision": settings["revision"],
        "value matrices": settings["base_sha256"][:_HASH],
        "dtype": settings["dtype"],
        "quantize": settings["quantize"],
    }
    for system in systems:
        if system["adapter"] is not None and not system["attributes"]:
            known[f"adapter {system['name']}"] = f"{system['adapter']} ({system['method']}, {system['sha256'][:_HASH]})"
    known["steered by"] = ", ".join(settings.get("attributes", ()))
    template = settings["tokenizer"]["chat_template"] if settings["apply_chat_template"] else None
    known["chat template"] = template[:_HASH] if template else "not applied"
    limit = settings["limit"]
    known["limit"] = "all documents" if limit is None else f"{limit} documents of each task"
    for name, key in _LISTED.items():
        known[name] = ", ".join(f"{each} {str(value)[:_HASH]}" for each, value in settings[key].items())
    return {name: str(value) for name, value in known.items() if value not in (None, "")}


def markdown(result: dict[str, Any]) -> str:
    """Return the page `results.md`."""
    data = {
        "facts": facts(result),
        "tables": result_tables(result),
        "compared": bool(result["comparisons"]),
        "level": result["settings"]["significance_level"],
        "thresholds": [threshold_line(row) for row in result.get("fail_under", ())],
    }
    return render("pages/evaluation.md.j2", data, cell=_cell)


def _cell(value: Any) -> str:
    return "-" if value is None else number(value, 3) if isinstance(value, float) else str(value)


def threshold_line(row: dict[str, Any]) -> str:
    """Return one line on whether a threshold is reached."""
    got = "was not measured" if row["value"] is None else f"is {number(row['value'])}"
    reached = "reached" if row["reached"] else "not reached"
    return f"{row['system']}: {row['task']} {row['metric']} {got}, {number(row['threshold'])} {reached}"


def _change(compared: dict[str, Any]) -> list[Any]:
    # In a stored result, values that are not finite are null.
    difference = compared["difference"]
    shown = None if difference is None else number(difference, form="+")
    return [shown, compared["p_holm"], significance_label(compared)]


def _with_error(entry: dict[str, Any]) -> str:
    value, error = entry["value"], entry["stderr"]
    if value is None:
        return "not finite"
    if error == 0 and value in (0, 1):  # no document differs
        low, high = share_interval([[bool(value)]] * entry["n"])
        return f"{value:.0f} (95 %: {_interval([low, high])})"
    return number(value) + ("" if error is None else f" ± {number(error, 2)}")


_POINT = ("s", "score", "95 %", "perplexity", "KL", "dist-1", "dist-2", "dist-3", "rep-4", "n")


def sweep_tables(document: dict[str, Any]) -> list[Table]:
    """Return the tables of a sweep."""
    points, scorer, slope = document["points"], document["scorer"], document["slope"]
    title = f"{document['attribute']} on {document['model']}; score: share {document['label']} by {scorer}"
    tables: list[Table] = [(title, _POINT, [_point(each) for each in points])]
    more = ["expected_maximum", "at_least_one"] if document["samples"] > 1 else []
    more += [name for name in RATINGS if name in points[0]]
    names = ["s", "effect", "effect_interval", "wrong_way", "wrong_way_interval", *more]
    title = f"effect on a prompt's value by {scorer}, and share of prompts that move the wrong way (Wilson)"
    if slope is not None:
        title += f"; slope {number(slope['slope'], 3)} per s (95 %: {_interval(slope['slope_interval'])})"
    columns = ("s", "effect", "95 %", "wrong way", "95 % ", *(name.replace("_", " ") for name in more))
    tables.append((title, columns, [[_interval(point[name]) for name in names] for point in points]))
    if document.get("answers"):
        names = ["s", "probability", "prefers_positive", "shift", "shift_interval", "wrong_way", "wrong_way_interval"]
        title = "preference between two answers; shift: of the log odds against s = 0"
        columns = ("s", "P(positive)", "preferred", "shift", "95 %", "wrong way", "95 % ", "n")
        rows = [[*(_interval(each[name]) for name in names), each["n"]] for each in document["answers"]]
        tables.append((title, columns, rows))
    if document.get("detection"):
        row = [_interval(document["detection"][name]) for name in ("layer", "auroc", "auroc_interval", "n")]
        tables.append(("detection, layer chosen on the other half", ("layer", "AUROC", "95 %", "n"), [row]))
    if document.get("baselines"):
        measured = [(each["method"], point) for each in document["baselines"] for point in each["points"]]
        rows = [
            [name, *_point(point), point["wrong_way"], _interval(point["wrong_way_interval"])]
            for name, point in measured
        ]
        columns = ("method", *_POINT, "wrong way", "95 % ")
        tables.append(("other ways to steer, on the same prompts", columns, rows))
        rows = [
            [f"{row['ratio']:g} times", "s > 0" if row["side"] > 0 else "s < 0", row["method"], row["attribute_score"],
             "" if row["reached"] else f"costs less, up to s = {row['s']:g}"]
            for row in document["at_equal_perplexity"]
        ]  # fmt: skip
        tables.append(("at equal perplexity", ("perplexity", "side", "method", "score", "note"), rows))
    if document["chosen"] is not None:
        title = "the best strength by half of the prompts, measured on the other half"
        halves = (document["chosen"][name] for name in ("unsteered_on_other_half", "on_other_half"))
        tables.append((title, _POINT, [_point(half) for half in halves]))
    return [_without_constants(table) for table in tables]


def _interval(value: Any) -> Any:
    """Return an interval as text, other values unchanged."""
    return f"{number(value[0], 3)} to {number(value[1], 3)}" if isinstance(value, list) else value


def _point(point: dict[str, Any]) -> list[Any]:
    low, high = point["attribute_score_interval"]
    names = ("perplexity", "kl", "distinct_1", "distinct_2", "distinct_3", "repetition", "n")
    return [point["s"], point["attribute_score"], f"{low:.2f}-{high:.2f}", *(point[name] for name in names)]


def plot_sweep(document: dict[str, Any], path: Path) -> None:
    """Plot a document of `braces steer --sweep` as PNG."""
    points = sorted(document["points"], key=lambda point: point["s"])
    baselines = document.get("baselines", [])
    drawn = figure(15 if baselines else 10, 4.6)
    base = Path(document["model"]).name
    texts = document["prompts"] * document["samples"]
    drawn.suptitle(plain_label(f"Steering {base} along {document['attribute']}: {texts} texts at each strength"))
    score, price, *both = drawn.subplots(1, 3 if baselines else 2)
    _line(score, points, "attribute_score")
    title = f"Texts that are {document['label']}, according to {document['scorer']}"
    score.set_title(plain_label(title), fontsize="medium")
    score.set_ylabel("share of texts")
    score.set_ylim(-0.02, 1.02)
    percent_ticks(score.yaxis)
    _line(price, points, "perplexity")
    price.set_yscale("log")
    plain_ticks(price.yaxis)
    title = f"Perplexity under {document['reference_model'] or 'the unsteered model'}"
    price.set_title(plain_label(title), fontsize="medium")
    price.set_ylabel("perplexity (log scale)")
    for axes, name in ((score, "attribute_score"), (price, "perplexity")):
        axes.set_xlabel("strength s")
        axes.axhline(document["unsteered"][name], color="gray", linestyle=":", label="without steering")
        if document["chosen"] is not None:
            chosen = document["chosen"]["s"]
            axes.axvline(chosen, color="gray", linestyle="--", label=f"suggested strength, s = {chosen:g}")
        axes.grid(alpha=0.3)
    if baselines:
        _compare(both[0], document)
    # One legend for all panels, below them: inside it would hide points.
    drawn.legend(*price.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    save_figure(drawn, path)


def _line(axes: Any, points: list[dict[str, Any]], name: str) -> None:
    """Plot a value at each strength, with a band for its interval."""
    axes.plot([point["s"] for point in points], [point[name] for point in points], marker="o", label="measured")
    known = [(point["s"], *point[f"{name}_interval"]) for point in points if point[f"{name}_interval"]]
    if known:
        axes.fill_between(*zip(*known, strict=True), alpha=0.2, label="95 % interval")


def _compare(axes: Any, document: dict[str, Any]) -> None:
    """Plot share against perplexity, one curve per method in the order of s through the unsteered point."""
    unsteered = {**document["unsteered"], "s": 0.0}
    for name, of_method in methods(document):
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
