"""Clamps hold a neuron, and only while they are asked to."""

from __future__ import annotations

import math

import pytest
import torch

from braces_cli.core.errors import ConfigError
from braces_cli.core.models.ffn import find_ffns
from braces_cli.inspection.clamp import Clamp, check_clamps, clamp_prompt, clamped, divergence, parse_clamp
from tests.conftest import ARCHITECTURES, tiny_model

IDS = torch.tensor([[0, 9, 20, 33]])


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_a_clamped_weight_is_that_value_and_no_other_changes(name):
    """At every position, in every architecture; leaving restores the model bit for bit."""
    model = tiny_model(name)
    ffns = find_ffns(model)
    with torch.no_grad():
        base = model(IDS).logits
        seen = []
        with clamped(ffns, [Clamp(0, 5, 2.5), Clamp(0, 7, -1.0)]):
            # Registered later, so it sees what the projection gets.
            handle = ffns[0].value.register_forward_pre_hook(lambda m, args: seen.append(args[0].reshape(-1, 52)))
            clamps_by_layer = model(IDS).logits
            handle.remove()
        handle = ffns[0].value.register_forward_pre_hook(lambda m, args: seen.append(args[0].reshape(-1, 52)))
        assert torch.equal(model(IDS).logits, base)
        handle.remove()
    assert not torch.allclose(clamps_by_layer, base)
    assert (seen[0][:, 5] == 2.5).all()
    assert (seen[0][:, 7] == -1.0).all()
    others = [j for j in range(52) if j not in (5, 7)]
    assert torch.equal(seen[0][:, others], seen[1][:, others])


def test_a_clamp_is_the_sum_of_sub_updates_with_one_weight_changed():
    """FFN output + (value - w_j) v_j."""
    model = tiny_model("llama")
    ffn = find_ffns(model)[1]
    h = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = ffn.host(h)
        w = torch.nn.functional.silu(ffn.host.gate_proj(h)) * ffn.host.up_proj(h)
        with clamped([ffn], [Clamp(1, 4, 3.0)]):
            clamps_by_layer = ffn.host(h)
    expected = plain + (3.0 - w[:, 4:5]) * ffn.value_matrix()[:, 4]
    assert torch.allclose(clamps_by_layer, expected.detach(), atol=1e-5)


def test_what_a_clamp_does_to_a_prompt(session):
    """Probabilities, KL and likelihoods, against two forward passes written out."""
    model, tokenizer = session.base.model, session.base.tokenizer
    clamp = Clamp(1, 3, 8.0)
    found = clamp_prompt(session, "the film is", [clamp], tokens=[40], top_k=4)
    ids = torch.tensor([tokenizer("the film is")["input_ids"]])
    with torch.no_grad():
        before = model(ids).logits[0].log_softmax(dim=-1)
        with clamped(session.ffns, [clamp]):
            after = model(ids).logits[0].log_softmax(dim=-1)
    kl = (before.exp() * (before - after)).sum(dim=-1)
    assert found["kl"] == pytest.approx(float(kl[-1]), rel=1e-4)
    assert found["kl_mean"] == pytest.approx(float(kl.mean()), rel=1e-4)
    own = sum(float(before[i, ids[0, i + 1]]) for i in range(ids.shape[1] - 1))
    assert found["log_likelihood_before"] == pytest.approx(own, rel=1e-4)
    assert found["log_likelihood_after"] != pytest.approx(own, rel=1e-4)
    assert found["tokens"][0]["id"] == 40
    rise = (after[-1].exp() - before[-1].exp()).topk(4).indices.tolist()
    assert [t["id"] for t in found["tokens"]][1:] == [t for t in rise if t != 40]
    for t in found["tokens"]:
        assert t["before"] == pytest.approx(math.exp(float(before[-1, t["id"]])), rel=1e-4)
        assert t["after"] == pytest.approx(math.exp(float(after[-1, t["id"]])), rel=1e-4)
        assert t["ratio"] == pytest.approx(t["after"] / t["before"], rel=1e-4)


def test_divergence():
    """KL(before || after) of two coins."""
    before, after = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
    assert float(divergence(before, after)) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3), rel=1e-5)


def test_the_form_of_a_clamp():
    """Numbers as Python reads them."""
    assert parse_clamp("3:89=2.5") == Clamp(3, 89, 2.5)
    assert parse_clamp(" 0:7=-1e1 ") == Clamp(0, 7, -10.0)
    assert parse_clamp("3:89=p99.9") == Clamp(3, 89, 0.0, percentile=99.9)
    for text in ("3:89", "3=2", "3:89=x", "3:89=nan", "3:89=inf", "-1:2=3", "a:2=3", "3:2=1=1", ""):
        with pytest.raises(ConfigError, match="LAYER:INDEX=VALUE"):
            parse_clamp(text)


@pytest.mark.parametrize(
    ("clamps", "message"),
    [
        ([Clamp(2, 0, 1.0)], "no feed-forward layer 2"),
        ([Clamp(0, 52, 1.0)], "no value vector 52"),
        ([Clamp(0, 1, 1.0), Clamp(0, 1, 2.0)], "named twice"),
    ],
)
def test_clamps_that_the_model_has_no_place_for(session, clamps, message):
    """What there is stands in the hint."""
    with pytest.raises(ConfigError, match=message):
        check_clamps(session.ffns, clamps)


def test_an_offloaded_base_is_clamped_like_a_loaded_one(opened_twice):
    """The weights are not on the device where the model computes."""
    plain, offloaded = (clamp_prompt(s, "the film", [Clamp(1, 3, 8.0)], top_k=3) for s in opened_twice("llama"))
    assert plain["kl"] > 0
    assert offloaded["kl"] == pytest.approx(plain["kl"], rel=1e-4)
    assert [token["id"] for token in offloaded["tokens"]] == [token["id"] for token in plain["tokens"]]
