"""Value vectors read as tokens, against the three lines that define it."""

from __future__ import annotations

import pytest
import torch

from braces_cli.core.models.ffn import find_ffns
from braces_cli.core.utils.errors import ConfigError
from braces_cli.inspection import logit_lens
from braces_cli.inspection.ffn_weights import side_vectors, sides_of
from braces_cli.inspection.logit_lens import LogitLens
from braces_cli.inspection.vector_tokens import value_tokens
from tests.conftest import ARCHITECTURES, tiny_model


def test_every_layer_and_index_of_a_trained_model_equals_a_direct_computation(shared):
    """The norm, the head, a stable sort: for every value vector of stories260K."""
    from braces_cli.core.models.load_options import LoadOptions
    from braces_cli.core.session import open_session

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


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_blocks_of_the_vocabulary_give_what_the_whole_does(name, monkeypatch):
    """Every architecture, with biased heads, cut where nothing divides evenly."""
    monkeypatch.setattr(logit_lens, "_TOKENS_AT_ONCE", 37)
    monkeypatch.setattr(logit_lens, "VECTORS_AT_ONCE", 11)
    model = tiny_model(name)
    vectors = find_ffns(model)[1].value_matrix().mT
    values, ids = LogitLens(model).best(vectors, 7)
    whole = LogitLens(model)(vectors)
    assert torch.allclose(values, whole.sort(dim=1, descending=True).values[:, :7], atol=1e-5)
    assert torch.allclose(values, whole.gather(1, ids), atol=1e-5)
    ranks, scores = LogitLens(model).ranks(vectors, [3, 50])
    assert torch.allclose(scores, whole[:, [3, 50]], atol=1e-5)
    assert (ranks[:, 0] == (whole > whole[:, [3]]).sum(dim=1) + 1).float().mean() > 0.95


def test_a_head_that_cannot_be_cut_is_used_whole(monkeypatch):
    """A packed head has no rows to take; the result is the same."""
    model = tiny_model("phi")
    vectors = find_ffns(model)[0].value_matrix().mT
    expected, row = LogitLens(model).best(vectors, 5), LogitLens(model).row(7)
    monkeypatch.setattr(logit_lens.LogitLens, "_plain", lambda self: False)
    found = LogitLens(model)
    assert torch.equal(found.best(vectors, 5)[1], expected[1])
    assert torch.allclose(found.row(7)[0], row[0], atol=1e-5)
    assert found.row(7)[1] == pytest.approx(row[1], abs=1e-5)


def test_never_holds_all_scores(monkeypatch):
    """No tensor of vectors x vocabulary is ever asked of the head."""
    monkeypatch.setattr(logit_lens, "_TOKENS_AT_ONCE", 16)
    model = tiny_model("llama")
    sizes = []
    blocks = logit_lens.LogitLens.blocks

    def watched(self, hidden):
        for start, scores in blocks(self, hidden):
            sizes.append(scores.shape[1])
            yield start, scores

    monkeypatch.setattr(logit_lens.LogitLens, "blocks", watched)
    monkeypatch.setattr(logit_lens.LogitLens, "__call__", lambda *a: pytest.fail("scored the whole vocabulary"))
    LogitLens(model).best(find_ffns(model)[0].value_matrix().mT, 5)
    assert set(sizes) == {16}


def test_half_precision_scores_are_near_those_of_the_model():
    """bfloat16 weights, whatever dtype the products are taken in."""
    model = tiny_model("llama", torch.bfloat16)
    vectors = find_ffns(model)[0].value_matrix().mT
    values, ids = LogitLens(model).best(vectors, 5)
    assert torch.allclose(values, LogitLens(model)(vectors).gather(1, ids), rtol=2e-2, atol=2e-1)


def test_sides_are_what_the_layer_computes_with():
    """act(gate h) * (up h) is what enters the value projection."""
    model = tiny_model("llama")
    ffn = find_ffns(model)[0]
    mlp = model.model.layers[0].mlp
    assert sides_of(ffn) == ("value", "gate", "up")
    assert torch.equal(side_vectors(ffn, "gate"), mlp.gate_proj.weight)
    assert torch.equal(side_vectors(ffn, "up"), mlp.up_proj.weight)
    assert torch.equal(side_vectors(ffn, "value"), mlp.down_proj.weight.T)


def test_which_half_of_a_fused_projection_is_the_gate_is_found_out():
    """Phi-3 keeps both in one matrix."""
    from transformers import AutoModelForCausalLM, Phi3Config

    config = Phi3Config(
        hidden_size=32, intermediate_size=52, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4,
        vocab_size=96, pad_token_id=1, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    ffn = find_ffns(model)[0]
    weight = model.model.layers[0].mlp.gate_up_proj.weight
    assert torch.equal(side_vectors(ffn, "gate"), weight[:52])
    assert torch.equal(side_vectors(ffn, "up"), weight[52:])


def test_swapped_projections_are_seen_through():
    """The order of the modules says nothing: what turns the sign of the product is `up`."""
    model = tiny_model("llama")
    mlp = model.model.layers[0].mlp
    gate, up, down = mlp.gate_proj, mlp.up_proj, mlp.down_proj
    del mlp.gate_proj, mlp.up_proj, mlp.down_proj
    mlp.up_proj, mlp.gate_proj, mlp.down_proj = up, gate, down
    ffn = find_ffns(model)[0]
    assert ffn.keys[0] is up
    assert torch.equal(side_vectors(ffn, "gate"), gate.weight)
    assert torch.equal(side_vectors(ffn, "up"), up.weight)


@pytest.mark.parametrize("name", ["gpt2", "opt", "gpt_neox", "phi"])
def test_an_ffn_without_a_gate(name):
    """Its one projection is `up`; `gate` is an error that says so."""
    ffn = find_ffns(tiny_model(name))[0]
    assert sides_of(ffn) == ("value", "up")
    assert side_vectors(ffn, "up").shape == (52, 32)
    with pytest.raises(ConfigError, match="no gate"):
        side_vectors(ffn, "gate")
