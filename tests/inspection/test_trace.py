"""Direct effects: they add up to the model's logit, and each part is the value that the model computes."""

import pytest
import torch

from braces_cli.core.adapter.reference import relevance_ref
from braces_cli.core.errors import ModelError
from braces_cli.core.models.ffn import layer_stack
from braces_cli.inspection.trace import attribute_logits, prompt_ids, record_activations
from braces_cli.inspection.trace import trace as run_trace
from braces_cli.inspection.vocabulary import LogitLens, final_norm
from tests.conftest import tiny_model
from tests.core.architectures import tiny
from tests.inspection.conftest import opened

PROMPT = "the film is good and the end"
# The module of each layer that adds the attention output to the residual stream.
ATTENTION = {
    "llama": "self_attn",
    "gpt2": "attn",
    "gpt_neox": "attention",
    "opt": "self_attn",
    "phi": "self_attn",
    "qwen2": "self_attn",
    "mistral": "self_attn",
}


def trace(session, **options):
    return run_trace(session, LogitLens(session.base), prompt_ids(session, PROMPT, "PROMPT"), **options)


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("name", sorted(ATTENTION))
def test_parts_add_up_to_the_logit(name, adapter):
    """Embedding + attention + sub-updates + biases, within 1e-4 relative, at every position."""
    session = opened(name, adapter=adapter)
    found = trace(session)
    ids = torch.tensor([session.base.tokenizer(PROMPT)["input_ids"]])
    with torch.no_grad():
        logits = session.base.model(ids).logits[0]
    assert len(found["positions"]) == ids.shape[1] == len(found["tokens"])
    for row in found["positions"]:
        logit = float(logits[row["position"]].max())
        assert row["target"]["id"] == int(logits[row["position"]].argmax())
        parts = [row[part] for part in ("embedding", "attention", "sub_updates", "biases")]
        assert row["logit"] == pytest.approx(logit, abs=1e-4 * abs(logit))
        assert sum(parts) == pytest.approx(logit, abs=1e-4 * abs(logit))
        assert abs(row["remainder"]) <= 1e-4 * max(map(abs, [logit, *parts]))


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "opt", "phi"])
def test_attention_is_the_output_of_the_attention(name, adapter):
    """The trace computes it as the rest of the layer's output; here the attention module is read."""
    session = opened(name, adapter=adapter)
    seen, handles = {}, []
    for number, layer in enumerate(layer_stack(session.base.model)[1]):
        module = layer.get_submodule(ATTENTION[name])
        handles.append(module.register_forward_hook(lambda m, a, out, n=number: seen.__setitem__(n, out[0][0])))
    # The last pass is that with the adapter.
    effects, _ = attribute_logits(session, LogitLens(session.base), prompt_ids(session, PROMPT, "PROMPT"), 7)
    for handle in handles:
        handle.remove()
    u = frozen_gradient(session.base.model, effects.run.last, 7)
    for number, output in seen.items():
        expected = (u * output).sum(dim=1)
        assert torch.allclose(effects.attention[number], expected, rtol=1e-3, atol=2e-4 * float(u.norm(dim=1).max()))


def frozen_gradient(model, x, token):
    """d(logit)/dx by autograd, with the scale of the norm detached, from the formulas of LayerNorm and RMSNorm."""
    norm = final_norm(model)
    x = x.detach().requires_grad_()
    centre = isinstance(norm, torch.nn.LayerNorm)
    z = x - x.mean(dim=1, keepdim=True) if centre else x
    eps = norm.eps if centre else norm.variance_epsilon
    hidden = z / (z.pow(2).mean(dim=1, keepdim=True) + eps).sqrt().detach() * norm.weight
    (hidden @ model.get_output_embeddings().weight[token]).sum().backward()
    return x.grad


@pytest.mark.parametrize(("name", "relevance"), [("llama", "input"), ("llama", "output"), ("phi", "output")])
def test_sub_updates_are_the_formula(name, relevance):
    """Index, w, r, g r and (w + g r) u . v_j; the FFN's output is w W_V^T + bias."""
    session = opened(name, adapter=True, relevance_to=relevance)
    found = trace(session, target=9, top=3)
    ids = session.base.tokenizer(PROMPT)["input_ids"]
    run = record_activations(session, session.ffns, LogitLens(session.base), ids)
    u = frozen_gradient(session.base.model, run.last, 9)
    assert len(found["layers"]) == 2 * len(found["tokens"])
    for row in found["layers"]:
        ffn, module = session.adapter.adapted_ffns[row["layer"]]
        position = row["position"]
        values = ffn.value_matrix().detach()
        w, query = run.weights[row["layer"]][position], run.queries[row["layer"]][position]
        if relevance == "output":
            bias = getattr(ffn.value, "bias", None)
            query = w @ values.mT + (0 if bias is None else bias.detach())
        r = relevance_ref(query, values, module).detach()
        g = 1.0 if relevance == "output" else module.g.detach()
        effect = (w + g * r) * (u[position] @ values)
        assert row["effect"] == pytest.approx(float(effect.sum()), rel=1e-3, abs=1e-4)
        assert [s["index"] for s in row["sub_updates"]] == effect.abs().topk(3).indices.tolist()
        for s in row["sub_updates"]:
            j = s["index"]
            assert s["weight"] == pytest.approx(float(w[j]), rel=1e-5)
            assert s["relevance"] == pytest.approx(float(r[j]), rel=1e-3, abs=1e-5)
            assert s["gated"] == pytest.approx(float(g * r[j]), rel=1e-3, abs=1e-5)
            assert s["effect"] == pytest.approx(float(effect[j]), rel=1e-3, abs=1e-5)


def test_base_figures_are_those_without_the_adapter():
    """For the same target."""
    session = opened("llama", adapter=True)
    both = trace(session, target=9, top=52)
    session.remove_adapter()
    alone = trace(session, target=9, top=52)
    for row, other in zip(both["layers"], alone["layers"], strict=True):
        by_index = {s["index"]: s for s in other["sub_updates"]}
        for s in row["sub_updates"]:
            assert s["base_effect"] == pytest.approx(by_index[s["index"]]["effect"], rel=1e-4, abs=1e-6)
            assert s["base_weight"] == pytest.approx(by_index[s["index"]]["weight"], rel=1e-4, abs=1e-6)
            assert by_index[s["index"]]["relevance"] is None
    assert both["positions"][-1]["base_logit"] == pytest.approx(alone["positions"][-1]["logit"], rel=1e-5)
    assert both["positions"][-1]["logit"] != pytest.approx(alone["positions"][-1]["logit"], rel=1e-3)


@pytest.mark.parametrize("name", ["gemma", "granite"])
def test_norm_weights_and_factors_are_measured(name):
    """Gemma multiplies by 1 + weight, Granite multiplies what it adds to the residual stream."""
    model = tiny_model("gemma", vocab_size=96) if name == "gemma" else tiny("granite")
    if name == "granite":
        for layer in model.model.layers:
            layer.residual_multiplier = 0.22
    row = trace(opened(model))["positions"][-1]
    assert row["logit"] == pytest.approx(row["model_logit"], rel=1e-4)
    assert sum(row[part] for part in ("embedding", "attention", "sub_updates", "biases")) == pytest.approx(row["logit"])


def test_architectures_without_direct_effects():
    """Gemma 2 has a norm between the FFN and the residual stream; experts have no single weight per token."""
    with pytest.raises(ModelError, match="changes its FFN's output"):
        trace(opened(tiny("gemma2")))
    with pytest.raises(ModelError, match="mixture of experts"):
        trace(opened(tiny("mixtral").eval()))


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_trace_of_an_offloaded_base(opened_twice, name):
    """Weights, biases and the head are read from where accelerate stores them."""
    plain, offloaded = (trace(session) for session in opened_twice(name))
    assert plain["layers"]
    assert approximate(offloaded) == plain


def approximate(value):
    """The value with its floats compared up to rounding."""
    if isinstance(value, dict):
        return {key: approximate(item) for key, item in value.items()}
    if isinstance(value, list):
        return [approximate(item) for item in value]
    return pytest.approx(value, rel=1e-4, abs=1e-5) if isinstance(value, float) else value
