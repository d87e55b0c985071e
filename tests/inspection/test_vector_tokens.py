"""Value vectors read as tokens, against the three lines that define it."""

from __future__ import annotations

import pytest

from braces_cli.inspection.vocabulary import value_tokens


def test_every_layer_and_index_of_a_trained_model_equals_a_direct_computation(shared):
    """The norm, the head, a stable sort: for every value vector of stories260K."""
    from braces_cli.core.adapter.model import open_session
    from braces_cli.core.options import LoadOptions

    session = open_session(str(shared / "models" / "stories260K"), None, LoadOptions(device="cpu", dtype="float32"))
    model = session.base.model
    rows = iter(value_tokens(session, top_k=10))
    count = 0
    for number, layer in enumerate(model.model.layers):
        scores = model.lm_head(model.model.norm(layer.mlp.down_proj.weight.T)).detach()
        best = scores.sort(dim=1, descending=True, stable=True)
        for index in range(scores.shape[0]):
            row = next(rows)
            count += 1
            assert (row["layer"], row["index"]) == (number, index)
            listed = [token["score"] for token in row["tokens"]]
            assert listed == pytest.approx(best.values[index, :10].tolist(), rel=1e-5, abs=1e-5)
            # Where two scores differ by less than rounding either may stand first.
            if (best.values[index, :10] - best.values[index, 1:11]).min() > 1e-5:
                assert [token["id"] for token in row["tokens"]] == best.indices[index, :10].tolist()
    assert count == 5 * 172
    assert next(rows, None) is None
