"""The picture of a sweep says what each line and bar is, in numbers that can be read."""

from __future__ import annotations

import pytest

from braces_cli.evaluation import tables


def point(s, share, perplexity):
    return {
        "s": s, "attribute_score": share, "attribute_score_interval": [max(0.0, share - 0.1), share + 0.1],
        "perplexity": perplexity, "perplexity_interval": [perplexity * 0.9, perplexity * 1.1],
    }  # fmt: skip


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """The figure of a sweep whose perplexities span less than a power of ten."""
    figures = []
    monkeypatch.setattr(tables, "save_figure", lambda figure, path: figures.append(figure))
    document = {
        "points": [point(2.0, 0.9, 96.0), point(-2.0, 0.1, 81.0), point(0.0, 0.5, 60.0)],
        "unsteered": point(0.0, 0.5, 60.0),
        "chosen": {"s": 2.0}, "model": "/models/tiny", "attribute": "posi$tive", "label": "positive", "scorer": "vader",
        "reference_model": None, "prompts": 20, "samples": 4,
    }  # fmt: skip
    tables.plot_sweep(document, tmp_path / "sweep.png")
    figures[0].canvas.draw()
    return figures[0]


def test_title_and_legend(drawn):
    assert drawn.get_suptitle() == r"Steering tiny along posi\$tive: 80 texts at each strength"
    assert all(axes.get_title() and axes.get_xlabel() and axes.get_ylabel() for axes in drawn.axes)
    labels = {text.get_text() for text in drawn.legends[0].get_texts()}
    assert labels == {"measured", "95 % interval", "without steering", "suggested strength, s = 2"}


def test_ticks_are_plain_numbers(drawn):
    share, perplexity = ([text.get_text() for text in axes.yaxis.get_ticklabels()] for axes in drawn.axes)
    assert "50%" in share or "40%" in share
    assert len(perplexity) >= 3
    assert [float(text) for text in perplexity]


def test_the_background_is_opaque(drawn, monkeypatch, tmp_path):
    """Black labels on a transparent picture cannot be read on a dark page."""
    import matplotlib
    from matplotlib.image import imread

    from braces_cli.core.render import figure, save_figure

    assert drawn.get_facecolor() == (1.0, 1.0, 1.0, 1.0)
    monkeypatch.setitem(matplotlib.rcParams, "savefig.transparent", True)
    save_figure(figure(1, 1), tmp_path / "empty.png")
    assert imread(tmp_path / "empty.png")[..., 3].min() == 1
