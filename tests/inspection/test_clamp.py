"""Clamped neurons, and percentiles of activation weights."""

import math

import pytest
import torch

from braces_cli.core.errors import ConfigError
from braces_cli.core.models.ffn import find_ffns
from braces_cli.core.models.tokenize import encode
from braces_cli.inspection import clamp as clamping
from braces_cli.inspection.vocabulary import LogitLens
from tests.conftest import ARCHITECTURES, tiny_model
from tests.inspection.conftest import opened

IDS = torch.tensor([[0, 9, 20, 33]])
TEXTS = ["the film is good", "a happy day in the old town", "the end", *["so it is"] * 8]


def record_weights(model, ffn, ids):
    """Run the model; return its logits and the activation weights (positions, d_ff) of one layer."""
    seen = []
    handle = ffn.value.register_forward_pre_hook(lambda module, args: seen.append(args[0].reshape(-1, 52)))
    with torch.no_grad():
        logits = model(ids).logits
    handle.remove()
    return logits, seen[0]


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_clamp_sets_one_weight(name):
    """At every position, in every architecture; after the block the model is bit-identical."""
    model = tiny_model(name)
    ffns = find_ffns(model)
    base, weights = record_weights(model, ffns[0], IDS)
    with clamping.clamped(ffns, [clamping.Clamp(0, 5, 2.5), clamping.Clamp(0, 7, -1.0)]):
        logits, changed = record_weights(model, ffns[0], IDS)
    assert torch.equal(record_weights(model, ffns[0], IDS)[0], base)
    assert not torch.allclose(logits, base)
    assert (changed[:, 5] == 2.5).all()
    assert (changed[:, 7] == -1.0).all()
    others = [j for j in range(52) if j not in (5, 7)]
    assert torch.equal(changed[:, others], weights[:, others])


def test_clamp_prompt(session, lens):
    """Probabilities, KL and likelihoods, against two forward passes."""
    model, tokenizer = session.base.model, session.base.tokenizer
    clamp = clamping.Clamp(1, 3, 8.0)
    found = clamping.clamp_prompt(session, lens, "the film is", [clamp], tokens=[40], top_k=4)
    ids = torch.tensor([tokenizer("the film is")["input_ids"]])
    with torch.no_grad():
        before = model(ids).logits[0].log_softmax(dim=-1)
        with clamping.clamped(session.ffns, [clamp]):
            after = model(ids).logits[0].log_softmax(dim=-1)
    kl = (before.exp() * (before - after)).sum(dim=-1)
    assert found["kl"] == pytest.approx(float(kl[-1]), rel=1e-4)
    assert found["kl_mean"] == pytest.approx(float(kl.mean()), rel=1e-4)
    assert 0 <= found["kl_noise"] < 1e-5 < found["kl"]
    rise = (after[-1].exp() - before[-1].exp()).topk(4).indices.tolist()
    assert [t["id"] for t in found["tokens"]] == [40, *(t for t in rise if t != 40)]
    for t in found["tokens"]:
        assert t["before"] == pytest.approx(math.exp(float(before[-1, t["id"]])), rel=1e-4)
        assert t["after"] == pytest.approx(math.exp(float(after[-1, t["id"]])), rel=1e-4)
        assert t["ratio"] == pytest.approx(t["after"] / t["before"], rel=1e-4)


def test_parse_clamp():
    """Numbers as Python reads them; percentiles with a p."""
    assert clamping.parse_clamp("3:89=2.5") == clamping.Clamp(3, 89, 2.5)
    assert clamping.parse_clamp(" 0:7=-1e1 ") == clamping.Clamp(0, 7, -10.0)
    assert clamping.parse_clamp("3:89=p99.9") == clamping.Clamp(3, 89, 0.0, percentile=99.9)
    assert clamping.parse_clamp("3:89=.5") == clamping.Clamp(3, 89, 0.5)
    for text in ("3:89", "3=2", "3:89=x", "3:89=nan", "3:89=1e999", "-1:2=3", "a:2=3", "3:2=1=1", "3:89=p101", ""):
        with pytest.raises(ConfigError, match="LAYER:INDEX=VALUE"):
            clamping.parse_clamp(text)


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2"])
def test_weights_and_percentiles_of_texts(name):
    """Padding does not count, neurons of one layer are not confused, and other values do not change."""
    session = opened(name)
    neurons = {1: [7, 2], 0: [3]}
    texts = [encode(session.base.tokenizer, text) for text in TEXTS]
    found = clamping.activation_weights(session, neurons, texts)
    expected = {}
    for ffn in session.ffns:
        rows = [record_weights(session.base.model, ffn, torch.tensor([text.ids]))[1] for text in texts]
        expected[ffn.layer] = torch.cat(rows)[:, neurons[ffn.layer]]
        assert found[ffn.layer].shape == expected[ffn.layer].shape
        assert torch.allclose(found[ffn.layer].sort(0).values, expected[ffn.layer].sort(0).values, atol=1e-5)
    clamps = [
        clamping.Clamp(1, 7, 0.0, 99.0),
        clamping.Clamp(0, 3, 5.0),
        clamping.Clamp(1, 2, 0.0, 0.0),
        clamping.Clamp(0, 4, 0.0, 100.0),
    ]
    resolved = clamping.resolve_percentiles(session, clamps, texts)
    assert [clamp.percentile for clamp in resolved] == [99.0, None, 0.0, 100.0]
    assert resolved[0].value == pytest.approx(float(expected[1][:, 0].quantile(0.99)), abs=1e-5)
    assert resolved[1] == clamps[1]
    assert resolved[2].value == pytest.approx(float(expected[1][:, 1].min()), abs=1e-5)


def test_clamps_and_weights_of_an_offloaded_base(opened_twice):
    """The weights of the model are not on the device that computes."""
    sessions = opened_twice("llama")
    texts = [encode(sessions[0].base.tokenizer, text) for text in TEXTS]
    plain, offloaded = (clamping.activation_weights(session, {1: [7, 3]}, texts)[1] for session in sessions)
    assert torch.allclose(plain, offloaded, atol=1e-6)
    plain, offloaded = (
        clamping.clamp_prompt(session, LogitLens(session.base), "the film", [clamping.Clamp(1, 3, 8.0)], top_k=3)
        for session in sessions
    )
    assert plain["kl"] > 0
    assert offloaded["kl"] == pytest.approx(plain["kl"], rel=1e-4)
    assert [token["id"] for token in offloaded["tokens"]] == [token["id"] for token in plain["tokens"]]
