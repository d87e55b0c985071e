"""Tables and plots: values that are not finite, labels and ticks that can be read."""

import math

from braces_cli.core.files import finite
from braces_cli.evaluation import tables
from braces_cli.evaluation.results import Metric, Scores
from braces_cli.evaluation.statistics import compare
from braces_cli.evaluation.systems import System
from braces_cli.evaluation.tables import markdown
from tests.evaluation.conftest import results


def test_values_that_are_not_finite_are_shown():
    values = {"base": math.inf, "other": 3.0}
    systems = [System(name, scores=Scores({"p": {"ppl": Metric(value, None, 2)}})) for name, value in values.items()]
    rows = {name: {"p": {"ppl": {"value": value, "stderr": None, "n": 2}}} for name, value in values.items()}
    result = results(rows, comparisons=compare(systems, 0))
    for each in (result, finite(result)):
        page = markdown(each)
        assert "Evaluation, task p, metric ppl, n 2" in page
        assert "| other | 3 |" in page
        assert page.count("no test") == 1
    assert "not finite" in page


def test_a_table_has_labels_and_no_powers_of_ten():
    """Wilson's interval in the place of ± 0; columns that say nothing are left out, equal values are in the title."""
    accuracy = {"value": 0.0, "stderr": 0.0, "n": 40, "chance": 0.25}
    scores = {"acc": accuracy, "ppl": {"value": 12345.6, "stderr": 210.4, "n": 40}}
    scores |= {name: {"value": 0.0, "stderr": 0.0, "n": 40} for name in ("empty", "truncated")}
    (title, columns, rows), *_ = tables.result_tables(results({"base": {"t": scores}}))
    assert (title, columns) == ("evaluation, task t, n 40, system base", ["metric", "value ± error", "chance"])
    assert rows == [["acc", "0 (95 %: 0 to 0.0876)", 0.25], ["ppl", "12346 ± 210", None]]
    scores["empty"]["value"], other = 0.5, {**scores, "acc": {**accuracy, "value": 0.5, "stderr": 0.08}}
    systems = [
        System(name, scores=Scores({"t": {"acc": Metric(value, None, 40)}}))
        for name, value in (("base", 0.0), ("o", 0.5))
    ]
    result = results({"base": {"t": scores}, "o": {"t": other}}, comparisons=compare(systems, 0))
    (_, columns, rows), *_ = tables.result_tables(result)
    assert columns == ["metric", "system", "value ± error", "chance", "change", "significance"]
    assert [row[0] for row in rows] == ["acc", "acc", "ppl", "ppl", "empty", "empty"]
    assert rows[1] == ["acc", "o", "0.5 ± 0.08", 0.25, "+0.5", "no test"]


def _point(s, share, perplexity):
    return {
        "s": s, "attribute_score": share, "attribute_score_interval": [max(0.0, share - 0.1), share + 0.1],
        "perplexity": perplexity, "perplexity_interval": [perplexity * 0.9, perplexity * 1.1],
    }  # fmt: skip


def test_the_plot_of_a_sweep_has_a_legend_and_plain_ticks(monkeypatch, tmp_path):
    """Perplexities are within one power of ten; a `$` in a name starts no formula."""
    figures = []
    monkeypatch.setattr(tables, "save_figure", lambda figure, path: figures.append(figure))
    document = {
        "points": [_point(2.0, 0.9, 96.0), _point(-2.0, 0.1, 81.0), _point(0.0, 0.5, 60.0)],
        "unsteered": _point(0.0, 0.5, 60.0), "chosen": {"s": 2.0}, "model": "/models/tiny", "attribute": "posi$tive",
        "label": "positive", "scorer": "vader", "reference_model": None, "prompts": 20, "samples": 4,
    }  # fmt: skip
    tables.plot_sweep(document, tmp_path / "sweep.png")
    (drawn,) = figures
    drawn.canvas.draw()
    assert r"posi\$tive" in drawn.get_suptitle()
    assert len(drawn.legends[0].get_texts()) == 4
    shown = [float(text.get_text()) for text in drawn.axes[1].yaxis.get_ticklabels()]
    assert len(shown) >= 3
