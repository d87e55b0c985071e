"""Direct effects: they add up to the model's logit, and each part is what the model computes at that place."""

from __future__ import annotations

import pytest
import torch

from braces_cli.core.adapter.model import Session, attach
from braces_cli.core.errors import ConfigError, ModelError
from braces_cli.core.models.ffn import find_ffns, layer_stack
from braces_cli.core.models.load import Base
from braces_cli.inspection.trace import attribute_logits, direct_factors, record_activations, trace
from tests.conftest import open_gates, tiny_model, tiny_tokenizer

PROMPT = "the film is good and the end"
# What of each layer adds the attention output to the stream.
ATTENTION = {
    "llama": "self_attn",
    "gpt2": "attn",
    "gpt_neox": "attention",
    "opt": "self_attn",
    "phi": "self_attn",
    "qwen2": "self_attn",
    "mistral": "self_attn",
}


def opened(name: str, adapter: bool = False, **overrides) -> Session:
    """A session over a tiny model of one architecture; its adapter has open gates."""
    model = tiny_model(name, vocab_size=96, **overrides)
    session = Session(Base(model, tiny_tokenizer(), name, None, None), find_ffns(model))
    if adapter:
        session.adapter = attach(model, 4)
        open_gates(session.adapter)
    return session


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("name", sorted(ATTENTION))
def test_the_parts_add_up_to_the_models_logit(name, adapter):
    """Embedding + attention + sub-updates + biases, within 1e-4 relative, at every position."""
    session = opened(name, adapter)
    found = trace(session, PROMPT)
    ids = torch.tensor([session.base.tokenizer(PROMPT)["input_ids"]])
    with torch.no_grad():
        logits = session.base.model(ids).logits[0]
    assert len(found["positions"]) == ids.shape[1] == len(found["tokens"])
    for row in found["positions"]:
        logit = float(logits[row["position"]].max())
        assert row["target"]["id"] == int(logits[row["position"]].argmax())
        parts = [row[part] for part in ("embedding", "attention", "sub_updates", "biases")]
        size = max(map(abs, [logit, *parts]))
        assert row["logit"] == pytest.approx(logit, abs=1e-4 * abs(logit))
        assert sum(parts) == pytest.approx(logit, abs=1e-4 * abs(logit))
        assert abs(row["remainder"]) <= 1e-4 * size


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "opt", "phi"])
def test_attention_is_what_leaves_the_attention(name, adapter):
    """The trace takes it as what the FFN does not explain; here it is read where the model computes it."""
    session = opened(name, adapter)
    stack = layer_stack(session.base.model)[1]
    seen, handles = {}, []
    for number, layer in enumerate(stack):
        module = layer.get_submodule(ATTENTION[name])
        handles.append(module.register_forward_hook(lambda m, a, out, n=number: seen.__setitem__(n, out[0][0])))
    found = attribute_logits(session, PROMPT, 7)
    with torch.no_grad():
        session.base.model(torch.tensor([found.ids]))
    for handle in handles:
        handle.remove()
    # The same direction, computed by autograd through the norm with its scale taken as a constant.
    u = frozen_gradient(session.base.model, found.run.last, 7)
    for number, output in seen.items():
        expected = (u * output).sum(dim=1)
        assert torch.allclose(
            found.effects.attention[number], expected, rtol=1e-3, atol=2e-4 * float(u.norm(dim=1).max())
        )


def frozen_gradient(model, x, token):
    """d(logit)/dx with the norm's scale detached, for LayerNorm and RMSNorm, by their formulas."""
    from braces_cli.inspection.vocabulary import final_norm

    norm = final_norm(model)
    x = x.detach().requires_grad_()
    centre = isinstance(norm, torch.nn.LayerNorm)
    z = x - x.mean(dim=1, keepdim=True) if centre else x
    eps = norm.eps if centre else norm.variance_epsilon
    hidden = z / (z.pow(2).mean(dim=1, keepdim=True) + eps).sqrt().detach() * norm.weight
    (hidden @ model.get_output_embeddings().weight[token]).sum().backward()
    return x.grad


def test_a_sub_update_is_written_out():
    """index, w, r, g r and c (w + g r) u . v_j, against the formula of the paper."""
    from braces_cli.core.adapter.reference import relevance_ref

    session = opened("llama", adapter=True)
    found = trace(session, PROMPT, target=9, top=3)
    run = record_activations(session, session.base.tokenizer(PROMPT)["input_ids"])
    u = frozen_gradient(session.base.model, run.last, 9)
    assert len(found["layers"]) == 2 * len(found["tokens"])
    for row in found["layers"]:
        ffn, adapter_layer = session.adapter.adapted_ffns[row["layer"]]
        position = row["position"]
        values = ffn.value_matrix().detach()
        r = relevance_ref(
            run.inputs[row["layer"]][position], values, adapter_layer.weight.detach(), adapter_layer.scale
        )
        w = run.weights[row["layer"]][position]
        effect = (w + adapter_layer.g.detach() * r) * (u[position] @ values)
        best = effect.abs().topk(3).indices.tolist()
        assert [s["index"] for s in row["sub_updates"]] == best
        for s in row["sub_updates"]:
            j = s["index"]
            assert s["weight"] == pytest.approx(float(w[j]), rel=1e-5)
            assert s["relevance"] == pytest.approx(float(r[j]), rel=1e-3, abs=1e-5)
            assert s["gated"] == pytest.approx(float(adapter_layer.g * r[j]), rel=1e-3, abs=1e-5)
            assert s["effect"] == pytest.approx(float(effect[j]), rel=1e-3, abs=1e-5)


def test_the_base_stands_beside_the_adapter():
    """Base figures are those of the model without it, for the same target."""
    session = opened("llama", adapter=True)
    both = trace(session, PROMPT, target=9, top=52)
    session.adapter.detach()
    session.adapter = None
    alone = trace(session, PROMPT, target=9, top=52)
    for row, other in zip(both["layers"], alone["layers"], strict=True):
        by_index = {s["index"]: s for s in other["sub_updates"]}
        for s in row["sub_updates"]:
            assert s["base_effect"] == pytest.approx(by_index[s["index"]]["effect"], rel=1e-4, abs=1e-6)
            assert s["base_weight"] == pytest.approx(by_index[s["index"]]["weight"], rel=1e-4, abs=1e-6)
            assert by_index[s["index"]]["relevance"] is None
    assert both["positions"][-1]["base_logit"] == pytest.approx(alone["positions"][-1]["logit"], rel=1e-5)
    assert both["positions"][-1]["logit"] != pytest.approx(alone["positions"][-1]["logit"], rel=1e-3)


def test_a_constant_factor_where_the_output_joins_is_found():
    """Granite multiplies what it adds to the stream."""
    from transformers import AutoModelForCausalLM, GraniteConfig

    torch.manual_seed(0)
    config = GraniteConfig(
        hidden_size=32, intermediate_size=52, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=96, residual_multiplier=0.22, embedding_multiplier=6.0, logits_scaling=1.0,
        bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    session = Session(Base(model, tiny_tokenizer(), "granite", None, None), find_ffns(model))
    assert direct_factors(model, session.ffns, torch.tensor([[3, 4, 5]])) == pytest.approx([0.22, 0.22], rel=1e-4)
    row = trace(session, PROMPT)["positions"][-1]
    assert row["logit"] == pytest.approx(row["model_logit"], rel=1e-4)


def test_an_output_that_is_normed_before_it_joins_is_refused():
    """Gemma 2: no sub-update has a direct effect of its own there."""
    from transformers import AutoModelForCausalLM, Gemma2Config

    config = Gemma2Config(
        hidden_size=32, intermediate_size=52, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, vocab_size=96, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    session = Session(Base(model, tiny_tokenizer(), "gemma2", None, None), find_ffns(model))
    with pytest.raises(ModelError, match="changes its FFN's output"):
        trace(session, PROMPT)


def test_a_prompt_that_does_not_fit_is_refused():
    """With the room there is."""
    with pytest.raises(ConfigError, match="tokens"):
        trace(opened("gpt2"), "a good film " * 40)


def test_gemmas_shifted_norm_weights_are_seen():
    """Gemma multiplies by 1 + weight; the norm is read by what it does."""
    row = trace(opened("gemma"), PROMPT)["positions"][-1]
    assert row["logit"] == pytest.approx(row["model_logit"], rel=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_an_offloaded_base_is_traced_like_a_loaded_one(opened_twice, name):
    """Weights, biases and the rows of the head are read where accelerate keeps them."""
    plain, offloaded = (trace(session, PROMPT) for session in opened_twice(name))
    assert plain["layers"]
    assert approximate(offloaded) == plain


def approximate(value):
    """The value, its numbers compared up to rounding."""
    if isinstance(value, dict):
        return {key: approximate(item) for key, item in value.items()}
    if isinstance(value, list):
        return [approximate(item) for item in value]
    return pytest.approx(value, rel=1e-4, abs=1e-5) if isinstance(value, float) else value
