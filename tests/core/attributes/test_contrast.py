"""Pairs of texts: what is pooled over, and the directions that the states reduce to."""

from __future__ import annotations

import pytest
import torch

from braces_cli.core.attributes.directions import Pair, PairStates, Passage, pair_states, reduce_pairs, separation
from braces_cli.core.attributes.words import REDUCTIONS
from braces_cli.core.errors import ConfigError
from braces_cli.core.models.ffn import layer_stack

PAIRS = [
    Pair(Passage(" film is good", "the happy"), Passage(" film is good", "the sad old")),
    Pair(Passage("a good day"), Passage("a sad day and an old end")),
]


def by_hand(session, passage, captured):
    """Mean state over the tokens of the text of one passage, (layers, d)."""
    tokenizer, model = session.base.tokenizer, session.base.model
    ids = tokenizer(passage.prompt + passage.text)["input_ids"]
    before = len(tokenizer(passage.prompt)["input_ids"]) if passage.prompt else 1
    seen = []
    if captured == "input":
        handles = [ffn.keys[0].register_forward_pre_hook(lambda m, a: seen.append(a[0][0])) for ffn in session.ffns]
    else:
        keep = lambda m, a, out: seen.append((out[0] if isinstance(out, tuple) else out)[0])  # noqa: E731
        handles = [layer.register_forward_hook(keep) for layer in layer_stack(model)[1]]
    with torch.no_grad():
        model(torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    return torch.stack([h[before:].mean(dim=0) for h in seen])


@pytest.mark.parametrize("captured", ["input", "output"])
def test_the_text_is_pooled_over_and_the_prompt_is_only_read(session, captured):
    """Each pair against one passage at a time, at the FFN inputs and at the outputs of the layers."""
    states = pair_states(session, PAIRS, captured=captured)
    for index, pair in enumerate(PAIRS):
        assert torch.allclose(states.positive[:, index], by_hand(session, pair.positive, captured), atol=1e-5)
        assert torch.allclose(states.negative[:, index], by_hand(session, pair.negative, captured), atol=1e-5)
    assert float((states.positive - states.negative).abs().max()) > 0.01


def planted(n=200, d=8, seed=0):
    """Pairs whose sides differ by +-1 along axis 0, with noise a pair shares along axis 1 and noise of each side."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(2, 1, n, d, generator=generator) * 0.2
    shared = torch.randn(1, n, 1, generator=generator) * 5 * torch.eye(d)[1]
    ends = torch.eye(d)[0]
    return PairStates(shared + noise[0] + ends, shared + noise[1] - ends)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_every_reduction_recovers_a_planted_direction(reduction):
    """Whatever pairs share is left out; the length is half the difference of means."""
    states = planted()
    (direction,) = reduce_pairs(states, reduction)
    assert float(direction[0] / direction.norm()) > 0.99
    mean = (states.positive - states.negative)[0].mean(dim=0).norm() / 2
    assert float(direction.norm()) == pytest.approx(float(mean), rel=1e-5)


def test_separation_is_measured_on_pairs_that_the_direction_has_not_seen():
    """High where there is a direction, and none in noise of many more dimensions than pairs."""
    (found,) = separation(planted())
    assert found["auroc"] > 0.6
    assert found["effect"] > 3
    noise = torch.randn(2, 1, 20, 500, generator=torch.Generator().manual_seed(0))
    (nothing,) = separation(PairStates(noise[0], noise[1]))
    assert abs(nothing["effect"]) < 1
    assert 0.2 < nothing["auroc"] < 0.8


def test_an_unknown_reduction_is_refused():
    """By name, with those there are."""
    with pytest.raises(ConfigError, match="no reduction `median`"):
        reduce_pairs(planted(), "median")
