"""Value, gate and up vectors: which is which is found by what the layer computes."""

from __future__ import annotations

import pytest
import torch

from braces_cli.core.errors import ConfigError
from braces_cli.core.models.ffn import find_ffns
from braces_cli.inspection.vocabulary import side_vectors
from tests.conftest import tiny_model


def test_sides_are_what_the_layer_computes_with():
    """act(gate h) * (up h) is what enters the value projection."""
    model = tiny_model("llama")
    ffn = find_ffns(model)[0]
    mlp = model.model.layers[0].mlp
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
    assert side_vectors(ffn, "up").shape == (52, 32)
    with pytest.raises(ConfigError, match="no gate"):
        side_vectors(ffn, "gate")
