"""Discovery by structure: what is found, what is refused, and how many parameters that makes."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from braces_cli.core.errors import ModelError
from braces_cli.core.models.ffn import find_ffns
from braces_cli.training.run import count_parameters
from braces_cli.training.settings import TrainSettings
from tests.conftest import ARCHITECTURES, GATED, tiny_model

LOOSE = {"opt"}  # no FFN module of its own
FIRST_KEY = {"gpt2": "c_fc", "gpt_neox": "dense_h_to_4h", "opt": "fc1", "phi": "fc1"}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_layer_has_its_pair(name):
    """Sizes, ends and host are right, and the value matrix is (d, d_ff) whichever way it is stored."""
    model = tiny_model(name)
    ffns = find_ffns(model)
    assert [ffn.layer for ffn in ffns] == [0, 1]
    for ffn in ffns:
        assert (ffn.hidden_size, ffn.value_vectors) == (32, 52)
        assert ffn.value_matrix().shape == (32, 52)
        assert ffn.value_matrix().data_ptr() == ffn.value.weight.data_ptr()  # a view, no copy
        key = next(n for n, m in ffn.host.named_children() if m is ffn.keys[0])
        assert key == FIRST_KEY.get(name, "gate_proj")
        assert ffn.is_host_output == (name not in LOOSE | {"gpt2"})  # GPT-2's FFN ends in a dropout
    assert model.get_submodule(ffns[1].path) is ffns[1].host
    assert model.get_parameter(ffns[1].value_path(model)) is ffns[1].value.weight


def test_a_value_vector_is_what_one_neuron_writes():
    """Column j of the value matrix is the output for the j-th unit weight, minus the bias."""
    for name in ("llama", "gpt2", "opt"):
        ffn = find_ffns(tiny_model(name))[0]
        zero = ffn.value(torch.zeros(1, 52))
        one = ffn.value(torch.eye(52)[7:8])
        assert torch.allclose((one - zero)[0], ffn.value_matrix()[:, 7], atol=1e-6)


def test_a_fused_gate_and_up_projection_is_one_key():
    """Phi-3 has one key of width 2 d_ff."""
    config = transformers.Phi3Config(**GATED, pad_token_id=0, bos_token_id=0, eos_token_id=1)
    ffn = find_ffns(transformers.AutoModelForCausalLM.from_config(config))[0]
    assert len(ffn.keys) == 1
    assert (ffn.hidden_size, ffn.value_vectors) == (32, 52)


def test_a_model_without_ffn_is_refused_by_what_was_looked_for_and_found():
    """Mamba has layers, and no pair of projections around an activation."""
    config = transformers.MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=96)
    with pytest.raises(ModelError) as caught:
        find_ffns(transformers.AutoModelForCausalLM.from_config(config))
    assert "MambaForCausalLM has no feed-forward layer, and braces attaches to nothing else" in str(caught.value)
    assert "d -> d_ff -> d" in str(caught.value)
    assert "MambaMixer" in str(caught.value)


def test_a_model_without_layers_is_refused():
    """A lone projection is no decoder."""
    with pytest.raises(ModelError, match="no list of layers"):
        find_ffns(nn.Sequential(nn.Linear(4, 4)))


QWEN = {
    "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
    "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
}  # fmt: skip
LLAMA2 = {
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 32, "vocab_size": 32000,
}  # fmt: skip
LLAMA3 = {**LLAMA2, "intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256}


@pytest.mark.parametrize(
    ("kind", "sizes", "rank", "expected", "total"),
    [
        ("Qwen2Config", QWEN, 16, 688_156, 1_543_714_304),
        ("LlamaConfig", LLAMA2, 16, 2_097_184, 6_738_415_616),
        ("LlamaConfig", LLAMA3, 32, 4_194_336, 8_030_261_248),
    ],
)
def test_parameter_counts_of_the_papers_models_without_weights(kind, sizes, rank, expected, total):
    """Qwen2.5-1.5B, Llama-2-7B and Llama-3-8B on the meta device."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**sizes))
    counts = count_parameters(model, find_ffns(model), TrainSettings(rank=rank))
    assert counts["trainable_parameters"] == expected
    assert counts["total_parameters"] == total
    assert not any("brace" in name for name, _ in model.named_modules())
