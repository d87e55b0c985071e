"""Likelihoods against a direct computation; no dependence on batches or windows."""

import math

import pytest
import torch

from braces_cli.core.models.tokenize import encode
from braces_cli.scoring.likelihood import Likelihood, likelihoods, safe_exp, text_likelihoods

TEXTS = ["the film is good", "a", "the end is sad and the town is old", "happy day"]


def direct(model, ids, labels):
    with torch.no_grad():
        logp = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1)
    return -sum(float(logp[i - 1, labels[i]]) for i in range(1, len(ids)) if labels[i] != -100)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_likelihood_is_the_sum_over_scored_tokens(session, batch_size):
    """Whatever the batch, and in the order given."""
    model, tokenizer = session.base.model, session.base.tokenizer
    examples = [encode(tokenizer, text, " and", end=True) for text in TEXTS]
    found = likelihoods(model, examples, tokenizer.pad_token_id, batch_size)
    for example, likelihood in zip(examples, found, strict=True):
        assert likelihood.nll == pytest.approx(direct(model, example.ids, example.labels), rel=1e-5)
        assert likelihood.tokens == example.scored


def test_windows_score_every_token_once_behind_one_start_token(session):
    """A long text in windows of 7 has all its tokens, each with what its window shows."""
    model, tokenizer = session.base.model, session.base.tokenizer
    (found,) = text_likelihoods(model, tokenizer, [TEXTS[2]], 7, 2)
    ids = encode(tokenizer, TEXTS[2]).ids
    assert ids[0] == tokenizer.bos_token_id
    assert ids[1] != tokenizer.bos_token_id
    expected = 0.0
    for start in range(0, len(ids) - 1, 6):
        part = ids[start : start + 7]
        expected += direct(model, part, [-100, *part[1:]])
    assert found.tokens == len(ids) - 1
    assert found.nll == pytest.approx(expected, rel=1e-5)


def test_a_tokenizer_without_a_start_token_gets_one(session):
    """Exactly one, put in front."""
    model, tokenizer = session.base.model, session.base.tokenizer
    plain = tokenizer("the film", add_special_tokens=False)["input_ids"]
    tokenizer.backend_tokenizer.post_processor = None
    assert tokenizer("the film")["input_ids"] == plain
    (found,) = text_likelihoods(model, tokenizer, ["the film"], 64, 2)
    assert found.tokens == len(plain)


def test_sums():
    """Perplexity is over tokens, not over examples."""
    both = Likelihood(2.0, 1) + Likelihood(0.0, 3)
    assert both.loss == 0.5
    assert both.perplexity == pytest.approx(math.exp(0.5))
    assert math.isnan(Likelihood().loss)


def test_safe_exp_is_exp_and_never_overflows():
    assert safe_exp(709.0) == math.exp(709.0)
    assert safe_exp(710.0) == math.inf
