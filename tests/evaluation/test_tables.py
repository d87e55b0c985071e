"""Tables and plots: values that are not finite, labels and ticks that can be read."""

from __future__ import annotations

import math

from braces_cli.core.files import finite
from braces_cli.evaluation import tables
from braces_cli.evaluation.results import Metric, Scores
from braces_cli.evaluation.statistics import compare
from braces_cli.evaluation.systems import System
from braces_cli.evaluation.tables import markdown
from tests.evaluation.conftest import results


def test_values_that_are_not_finite_are_shown(tmp_path):
    values = {"base": math.inf, "other": 3.0}
    systems = [System(name, scores=Scores({"p": {"ppl": Metric(value, None, 2)}})) for name, value in values.items()]
    rows = {name: {"p": {"ppl": {"value": value, "stderr": None, "n": 2}}} for name, value in values.items()}
    result = results(rows, comparisons=compare(systems, 0))
    for each in (result, finite(result)):
        page = markdown(each)
        assert "| p | ppl | 2 | other | 3 |" in page
        assert page.count("no test") == 1
        tables.draw(each, tmp_path / "p.png")
    assert "not finite" in page


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
