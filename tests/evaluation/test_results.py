"""Scores and their output folder."""

import json
import math
from dataclasses import replace

import pytest

from braces_cli.evaluation import catalog
from braces_cli.evaluation.results import AVERAGE, Metric, Scores, Store, slug


def test_the_average_is_the_plain_mean_over_tasks():
    scores = Scores()
    members = catalog.GROUPS["zero_shot"]
    for place, task in enumerate(members):
        scores.results[task] = {"acc": Metric(place / 10, 0.3, place + 1), "other": Metric(9.0, None, 1)}
    scores.add_averages(catalog.Selection(groups={"zero_shot": list(members)}).averaged)
    average = scores.results["zero_shot"][AVERAGE]
    assert (average.value, average.stderr, average.n) == pytest.approx((0.2, 0.3 / math.sqrt(5), 15))


def test_different_names_have_different_file_names():
    names = ["base", "a/b", "a_b", "../up", "x" * 200, "x" * 201, "ü"]
    slugs = [slug(name) for name in names]
    assert len(set(slugs)) == len(names)
    assert all("/" not in each and not each.startswith(".") and len(each) < 100 for each in slugs)
    assert slugs[0] == "base"


def test_scores_are_read_as_they_were_stored(tmp_path):
    """Infinite values and integer keys included, samples excluded."""
    metric = Metric(math.inf, None, 2, {0: 1.0, 7: math.inf}, {0: 3.0, 7: 4.0}, False)
    scores = Scores({"t": {"m": metric}}, {"t": 1}, {"t": 2.0}, [2, 8], [{"task": "t", "doc_id": 0}])
    store = Store(tmp_path, log_samples=True)
    store.save("base, x +1", "t", scores)
    found = store.load("base, x +1", "t")
    assert found == replace(scores, samples=[])
    assert store.load("base", "t") is None
    (log,) = (tmp_path / "samples").rglob("t.jsonl")
    assert json.loads(log.read_text()) == {"system": "base, x +1", "task": "t", "doc_id": 0}
