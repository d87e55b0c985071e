"""Directions from pairs, and from gradients: against finite differences and dense algebra."""

from typing import Any

import pytest
import torch

from braces_cli.core.adapter.model import Session
from braces_cli.core.attributes import directions as reductions
from braces_cli.core.attributes.pooling import output_watches
from braces_cli.core.attributes.words import REDUCTIONS
from braces_cli.core.models.ffn import layer_stack
from braces_cli.core.models.load import Base
from braces_cli.scoring.likelihood import continuation_likelihoods
from tests.conftest import tiny_model, tiny_tokenizer

PAIRS = [
    reductions.Pair(
        reductions.Passage(" film is good", "the happy"), reductions.Passage(" film is good", "the sad old")
    ),
    reductions.Pair(reductions.Passage("a good day"), reductions.Passage("a sad day and an old end")),
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
    outputs = output_watches(session.base.model, session.ffns)
    states = reductions.pair_states(
        session, PAIRS, [ffn.watch for ffn in session.ffns] if captured == "input" else outputs
    )
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
    return reductions.PairStates(shared + noise[0] + ends, shared + noise[1] - ends)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_every_reduction_recovers_a_planted_direction(reduction):
    """Common parts of the sides of a pair have no effect; the length is half the difference of means."""
    states = planted()
    (direction,) = reductions.reduce_pairs(states, reduction)
    assert float(direction[0] / direction.norm()) > 0.99
    mean = (states.positive - states.negative)[0].mean(dim=0).norm() / 2
    assert float(direction.norm()) == pytest.approx(float(mean), rel=1e-5)


def test_separation_is_measured_on_pairs_that_the_direction_has_not_seen():
    """High along a planted direction, and at chance level in noise with more dimensions than pairs."""
    (found,) = reductions.separation(planted())
    assert found["auroc"] > 0.6
    assert found["effect"] > 3
    noise = torch.randn(2, 1, 20, 500, generator=torch.Generator().manual_seed(0))
    (nothing,) = reductions.separation(reductions.PairStates(noise[0], noise[1]))
    assert abs(nothing["effect"]) < 1
    assert 0.2 < nothing["auroc"] < 0.8


def opened(name: str) -> Session:
    model = tiny_model(name, dtype=torch.float64, vocab_size=96)
    return Session(Base(model, tiny_tokenizer(), name))


def odds(session: Session, items: list[reductions.Item], vectors: Any, weights: list[torch.Tensor]) -> float:
    """Mean over items of sum c log p / places with constants added at each layer, one text at a time."""
    total = 0.0
    handles = [
        ffn.value.register_forward_hook(lambda module, args, out, v=vector: out + v.to(out))
        for ffn, vector in zip(session.ffns, vectors, strict=True)
    ]
    for item, weight in zip(items, weights, strict=True):
        with torch.no_grad():
            log_p = session.base.model(torch.tensor([item.ids])).logits[0, item.first :].double().log_softmax(-1)
        total += float((weight * log_p).sum()) / len(log_p)
    for handle in handles:
        handle.remove()
    return total / len(items)


def bare_weights(session: Session, items: list[reductions.Item]) -> list[torch.Tensor]:
    found = []
    for item in items:
        with torch.no_grad():
            log_p = session.base.model(torch.tensor([item.ids])).logits[0, item.first :].double().log_softmax(-1)
        found.append(item.weigh(log_p.float()).double())
    return found


# OPT flattens its tokens before the FFN.
@pytest.mark.parametrize("name", ["llama", "opt"])
def test_the_gradient_of_the_odds_against_finite_differences(name):
    """Of texts of several lengths, in batches, at every layer at once; the odds are the mean log-likelihood."""
    session = opened(name)
    one = [reductions.Passage(" good day", "a"), reductions.Passage(" happy film", "the")]
    other = [reductions.Passage(" sad end", "the"), reductions.Passage("bad")]
    items = reductions.text_items(session, one, other)
    weights = bare_weights(session, items)
    nats = continuation_likelihoods(session.base, [(each.prompt, each.text) for each in (*one, *other)], 4)
    expected = sum(sign * each.loss for sign, each in zip((-1, -1, 1, 1), nats, strict=True)) / 4
    assert odds(session, items, torch.zeros(len(session.ffns), 32), weights) == pytest.approx(expected, rel=1e-5)
    gradient = reductions.odds_gradient(session, items).double()
    assert gradient.shape == (len(session.ffns), 32)
    step = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    step = 1e-4 * step / step.norm()
    measured = odds(session, items, step, weights) - odds(session, items, -step, weights)
    assert measured == pytest.approx(2 * float((gradient * step).sum()), rel=1e-3)


def test_the_damped_solve_is_that_of_the_dense_matrix():
    """(F + r I) x = g with F the mean of u u^T and r a multiple of its mean diagonal, more or fewer draws than d."""
    generator = torch.Generator().manual_seed(0)
    for count in (3, 40):
        draws, expected = torch.randn(2, count, 12, generator=generator), torch.randn(2, 12, generator=generator)
        found = reductions.damped_solve(draws, expected)
        for row, target, solved in zip(draws.double(), expected.double(), found.double(), strict=True):
            fisher = row.T @ row / count
            dense = fisher + reductions.RIDGE * fisher.diagonal().mean() * torch.eye(12)
            assert torch.allclose(dense @ solved, target, atol=1e-5)


def test_draws_are_gradients_of_next_tokens(session):
    """Their mean over many draws is near 0, as for every score function, and their norms are not."""
    draws = reductions.next_token_gradients(session)
    assert draws.shape[0] == len(session.ffns)
    assert float(draws.mean(dim=1).norm()) < 0.3 * float(draws.norm(dim=-1).mean())
    assert torch.equal(draws, reductions.next_token_gradients(session))


def test_a_vector_along_the_direction_raises_the_odds_of_the_words():
    """The opposite vector lowers them, in each layer."""
    session = opened("llama")
    items = reductions.word_items(session, ["good", "happy", "day"], ["sad", "old", "town"])
    weights = bare_weights(session, items)
    directions = reductions.cheapest_directions(session, items)
    nothing = torch.zeros_like(directions)
    bare = odds(session, items, nothing, weights)
    for layer, direction in enumerate(directions):
        vector = nothing.clone()
        vector[layer] = 1e-2 * direction / direction.norm()
        assert odds(session, items, vector, weights) > bare > odds(session, items, -vector, weights)


def test_words_that_share_their_first_tokens_count_as_texts(session):
    """Here every word is split into letters, and both sides begin with the same letters."""
    items = reductions.word_items(session, ["xyz", "qed"], ["xed", "qyz"])
    words = {session.base.tokenizer.decode(item.ids)[-2:] for item in items}
    assert {"xy", "qe", "xe", "qy"} <= words


def test_a_description_counts_by_its_effect_on_the_next_tokens(session):
    """Against one prompt at a time; the weights of each place sum to 0."""
    sides = [
        [reductions.Passage(" the", f"a {mood} day.") for mood in each] for each in (("good", "sad"), ("happy", "old"))
    ]
    pairs = [reductions.Pair(*both) for both in sides]
    (item,) = reductions.description_items(session, pairs, "")
    tokenizer, model = session.base.tokenizer, session.base.model
    text = tokenizer(" the", add_special_tokens=False)["input_ids"]
    assert list(item.ids) == [tokenizer.bos_token_id, *text]
    expected: Any = 0
    for pair in pairs:
        for sign, side in ((0.5, pair.positive), (-0.5, pair.negative)):
            ids = tokenizer(side.prompt + side.text)["input_ids"]
            with torch.no_grad():
                expected = expected + sign * model(torch.tensor([ids])).logits[0, -len(text) :].softmax(-1)
    weights = item.weigh(torch.zeros_like(expected))
    assert torch.allclose(weights, expected, atol=1e-5)
    assert float(weights.sum(dim=-1).abs().max()) < 1e-5
