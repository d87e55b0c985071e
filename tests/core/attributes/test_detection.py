"""Concept detection: projections by hand, areas against scikit-learn."""

from __future__ import annotations

import pytest
import torch

from braces_cli.core.attributes.directions import area
from braces_cli.core.attributes.vector import build_attribute
from braces_cli.core.errors import DataError
from braces_cli.evaluation.native_tasks import area_error, detection, projections

TEXTS = ["the film is good", "a happy day", "the end of the old town", "is sad", "good and happy", "in the town"]


def test_a_score_is_the_largest_projection_of_a_token(session):
    good = build_attribute(session, "good", ["good", "happy"])
    found = projections(session, good, TEXTS)
    assert found.shape == (2, 6)
    for column, text in enumerate(TEXTS):
        entered: dict[int, torch.Tensor] = {}
        handles = [
            ffn.watch(lambda h, i=i, seen=entered: seen.update({i: h[0, 1:]})) for i, ffn in enumerate(session.ffns)
        ]
        with torch.no_grad():
            session.base.model(torch.tensor([session.base.tokenizer(text)["input_ids"]]))
        for handle in handles:
            handle.remove()
        for layer, h in entered.items():
            direction = good.state[layer] / good.state[layer].norm()
            assert float(found[layer, column]) == pytest.approx(float((h @ direction).max()), rel=1e-4)


def test_the_layer_is_chosen_on_other_texts_than_it_is_measured_on(session):
    from sklearn.metrics import roc_auc_score

    good = build_attribute(session, "good", ["good", "happy"])
    has = [True, True, False, False, True, False]
    scores = projections(session, good, TEXTS)
    rows = [(text, "Good" if flag else "other") for text, flag in zip(TEXTS, has, strict=True)]
    found = detection(session, good, rows, "good", "rows")
    for row in found["layers"]:
        assert row["auroc"] == pytest.approx(roc_auc_score(has, scores[row["layer"]]))
    chosen = [roc_auc_score([1, 1, 0, 0], scores[layer][[0, 4, 2, 5]]) for layer in range(2)]
    assert chosen[found["layer"]] == max(chosen)
    assert found["auroc"] == pytest.approx(roc_auc_score([1, 0], scores[found["layer"]][[1, 3]]))
    assert found["n"] == 2
    with pytest.raises(DataError, match="1 texts are `good` and 5 are not"):
        detection(session, good, [rows[0], *((text, "other") for text in TEXTS[1:])], "good", "rows")


def test_ties_count_half_and_the_error_is_that_of_resampling():
    assert area(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 0.0])) == pytest.approx(0.875)
    generator = torch.Generator().manual_seed(0)
    drawn = [area(torch.randn(60, generator=generator) + 1, torch.randn(80, generator=generator)) for _ in range(400)]
    value = sum(drawn) / len(drawn)
    spread = torch.tensor(drawn).std().item()
    assert area_error(value, 60, 80) == pytest.approx(spread, rel=0.15)
