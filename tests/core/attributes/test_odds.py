"""Directions by gradient: against finite differences and dense algebra, and that they do what they are for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from braces_cli.core.adapter.model import Session
from braces_cli.core.attributes.directions import (
    Item,
    Pair,
    Passage,
    cheapest_directions,
    damped_solve,
    description_items,
    next_token_gradients,
    odds_gradient,
    text_items,
    word_items,
)
from braces_cli.core.models.load import Base
from tests.conftest import tiny_model, tiny_tokenizer


def opened(name: str) -> Session:
    model = tiny_model(name, dtype=torch.float64, vocab_size=96)
    return Session(Base(model, tiny_tokenizer(), name))


def odds(session: Session, items: list[Item], vectors: Any, weights: list[torch.Tensor]) -> float:
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


def bare_weights(session: Session, items: list[Item]) -> list[torch.Tensor]:
    found = []
    for item in items:
        with torch.no_grad():
            log_p = session.base.model(torch.tensor([item.ids])).logits[0, item.first :].double().log_softmax(-1)
        found.append(item.weigh(log_p.float()).double())
    return found


# OPT flattens its tokens before the FFN.
@pytest.mark.parametrize("name", ["llama", "opt"])
def test_the_gradient_of_the_odds_against_finite_differences(name):
    """Of texts of several lengths, in batches, at every layer at once."""
    session = opened(name)
    one = [Passage(" good day", "a"), Passage(" happy film", "the")]
    items = text_items(session, one, [Passage(" sad end", "the old"), Passage("bad")])
    weights = bare_weights(session, items)
    gradient = odds_gradient(session, items).double()
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
        found = damped_solve(draws, expected, 3.0)
        for row, target, solved in zip(draws.double(), expected.double(), found.double(), strict=True):
            fisher = row.T @ row / count
            dense = fisher + 3.0 * fisher.diagonal().mean() * torch.eye(12)
            assert torch.allclose(dense @ solved, target, atol=1e-5)


def test_draws_are_gradients_of_next_tokens(session):
    """Their mean over many draws is near 0, as that of every score function is, and they are not."""
    draws = next_token_gradients(session)
    assert draws.shape[0] == len(session.ffns)
    assert float(draws.mean(dim=1).norm()) < 0.3 * float(draws.norm(dim=-1).mean())
    assert torch.equal(draws, next_token_gradients(session))


def test_pushing_along_the_direction_raises_the_odds_of_the_words():
    """And against it lowers them, at every layer alone."""
    session = opened("llama")
    items = word_items(session, ["good", "happy", "day"], ["sad", "old", "town"])
    weights = bare_weights(session, items)
    directions = cheapest_directions(session, items)
    nothing = torch.zeros_like(directions)
    bare = odds(session, items, nothing, weights)
    for layer, direction in enumerate(directions):
        vector = nothing.clone()
        vector[layer] = 1e-2 * direction / direction.norm()
        assert odds(session, items, vector, weights) > bare > odds(session, items, -vector, weights)


def test_words_that_share_their_first_tokens_count_as_texts(session):
    """Here every word falls into letters, and both sides begin with the same ones."""
    items = word_items(session, ["xyz", "qed"], ["xed", "qyz"])
    words = {session.base.tokenizer.decode(item.ids)[-2:] for item in items}
    assert {"xy", "qe", "xe", "qy"} <= words


def test_a_description_counts_by_what_it_makes_of_the_next_tokens(session):
    """Against one prompt at a time; the text stands alone, and probabilities on either side cancel."""
    pairs = [Pair(Passage(" the", f"a {mood} day."), Passage(" the", f"a {other} day.")) for mood, other in
             (("good", "sad"), ("happy", "old"))]  # fmt: skip
    (item,) = description_items(session, pairs, "")
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
