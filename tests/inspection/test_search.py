"""The vectors that promote a concept or an attribute most, against direct computations."""

import re

import pytest
import torch

from braces_cli.core.adapter.files import find_adapter
from braces_cli.core.adapter.reference import relevance_ref
from braces_cli.core.attributes.hooks import layer_steering, steered
from braces_cli.core.attributes.lookup import find_attribute
from braces_cli.core.attributes.vector import STEERING_SHARE
from braces_cli.core.attributes.words import neutral_texts
from braces_cli.inspection import vocabulary
from braces_cli.inspection.maps import Concept, best_first
from braces_cli.inspection.report import report_data
from braces_cli.inspection.search import attribute_relevance, top_vectors_for_attribute, top_vectors_for_concept
from braces_cli.inspection.vocabulary import LogitLens
from tests.conftest import make_adapter
from tests.core.architectures import tiny
from tests.inspection.conftest import opened
from tests.inspection.test_vocabulary import expected_scores


@pytest.mark.parametrize("name", ["llama", "mixtral", "deepseek_v3"])
def test_vectors_for_a_concept(name, monkeypatch):
    """Rank and score of every vector, sorted; in blocks that do not divide the experts evenly."""
    monkeypatch.setattr(vocabulary, "VECTORS_AT_ONCE", 11)
    monkeypatch.setattr(vocabulary, "_TOKENS_AT_ONCE", 13)
    session = opened(name if name == "llama" else tiny(name).eval())
    rows = []
    for layer, scores in enumerate(expected_scores(session.base.model)):
        for index, row in enumerate(scores):
            rank = int((row > row[40]).sum()) + 1
            rows.append({"layer": layer, "index": index, "rank": rank, "score": float(row[40])})
    expected = sorted(rows, key=best_first)[:6]
    found = top_vectors_for_concept(LogitLens(session.base), session.ffns, Concept([[(40,)]]), limit=6, top_k=3)
    for row, other in zip(found, expected, strict=True):
        assert (row["layer"], row["index"], row["rank"]) == (other["layer"], other["index"], other["rank"])
        assert row["score"] == pytest.approx(other["score"], rel=1e-4)
        assert len(row["tokens"]) == 3
    if found[0]["rank"] <= 3:
        assert found[0]["tokens"][found[0]["rank"] - 1]["id"] == 40


@pytest.mark.parametrize("relevance", ["input", "output"])
def test_relevance_through_an_adapter_is_the_formula(session, lens, tmp_path, relevance):
    """r_c = c (R W_V)^T (R h_c) / sqrt(d_r)."""
    session.add_adapter(find_adapter(str(make_adapter(session, tmp_path / "adapter", relevance_to=relevance))))
    attribute = find_attribute(session, "positive", None, for_steering=False)
    scores = []
    for row, steering in enumerate(layer_steering(session, [(attribute, 1.0)])):
        ffn, module = session.adapter.adapted_ffns[row]
        expected = relevance_ref(attribute.state_at(relevance)[row], ffn.value_matrix(), module).detach()
        assert torch.allclose(attribute_relevance(session, steering), expected, rtol=1e-4, atol=1e-6)
        scores += [(float(score), ffn.layer, index) for index, score in enumerate(expected)]
    found = top_vectors_for_attribute(session, lens, attribute, limit=4)
    assert [(row["layer"], row["index"]) for row in found] == [each[1:] for each in sorted(scores, reverse=True)[:4]]


@pytest.mark.parametrize("adapted", [False, True])
def test_find_and_report_show_what_the_hooks_add(session, lens, tmp_path, adapted):
    """The same layers, the same vector as the weighted sum of value vectors, and its tokens on the page."""
    if adapted:
        session.add_adapter(find_adapter(str(make_adapter(session, tmp_path / "adapter"))))
    attribute = find_attribute(session, "positive", None)
    outputs = {ffn.layer: [] for ffn in session.ffns}
    handles = [ffn.host.register_forward_hook(lambda m, a, y, ffn=ffn: outputs[ffn.layer].append(y))
               for ffn in session.ffns]  # fmt: skip
    with torch.no_grad():
        for terms in ([], [(attribute, 1.0)]):
            with steered(session, terms):
                session.base.model(torch.tensor([[0, 5, 6]]))
    for handle in handles:
        handle.remove()
    # The first layer has the same input in both passes.
    first = (outputs[0][1] - outputs[0][0])[0, -1]
    changed = [layer for layer in outputs if layer in attribute.effective_layers]
    found = top_vectors_for_attribute(session, lens, attribute, limit=1000)
    assert sorted({row["layer"] for row in found}) == changed == [0]
    weights = torch.zeros(session.ffns[0].value_vectors)
    for row in found:
        weights[row["index"]] = row["score"]
    assert torch.allclose(session.ffns[0].value_matrix() @ weights, first, rtol=1e-3, atol=1e-5)
    (page,) = (each for each in report_data(session, lens, "the film")["attributes"] if each["name"] == "positive")
    assert [(row["layer"], row["share"]) for row in page["layers"]] == [(0, 1.0)]
    # The tokens of the page rise most if this vector, at a tenth of the residual stream's norm, is added by hand.
    texts, found = [torch.tensor([session.base.tokenizer(text)["input_ids"]]) for text in neutral_texts()], []
    for vector in (0 * first, first * STEERING_SHARE / layer_steering(session, [(attribute, 1.0)])[0].share):
        handle = session.ffns[0].host.register_forward_hook(lambda m, a, y, vector=vector: y + vector)
        with torch.no_grad():
            found.append(torch.cat([session.base.model(ids).logits[0].log_softmax(-1) for ids in texts]))
        handle.remove()
    rise, likely = (found[1] - found[0]).mean(0), found[0].exp().mean(0)
    words = [token for token in range(len(rise)) if re.fullmatch(r"\s[^\W\d_]{2,}", lens.text(token))]
    common = sorted(words, key=lambda token: -likely[token])[: len(words) // 2 + 1]
    expected = sorted(common, key=lambda token: -rise[token])[:8]
    assert page["layers"][0]["tokens"] == [lens.text(token) for token in expected]
    unsteered, steered_up = ([row["texts"][k]["text"] for row in page["examples"]] for k in (1, 2))
    assert unsteered != steered_up
