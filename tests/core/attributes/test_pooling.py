"""Pooling of words and texts, against one sequence at a time."""

import pytest
import torch

from braces_cli.core.adapter.model import Session
from braces_cli.core.attributes.build import attribute_from_texts, build_attribute
from braces_cli.core.attributes.pooling import pool_texts, pool_words
from braces_cli.core.attributes.words import POOLINGS, built_in, neutral_texts
from braces_cli.core.models.ffn import find_ffns
from braces_cli.core.models.load import Base
from tests.conftest import tiny_model, tiny_tokenizer

BY_HAND = {"mean": lambda h: h.mean(1), "last": lambda h: h[:, -1], "max": lambda h: h.max(1).values}
TEXTS = ["the film is good", "a day", "the end is sad", "happy town, old town and a good end", "a day"]


def both_ends(model, ffn, ids):
    """Input and output of an FFN for one sequence, (2, tokens, d)."""
    seen = []
    handles = [
        ffn.keys[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].reshape(len(ids), -1))),
        ffn.value.register_forward_hook(lambda module, args, output: seen.append(output.reshape(len(ids), -1))),
    ]
    with torch.no_grad():
        model(torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    return torch.stack(seen)


# OPT flattens its tokens before the FFN.
@pytest.mark.parametrize("name", ["llama", "opt"])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_texts_are_pooled_over_their_tokens_then_over_texts(name, pooling):
    """The start token is not pooled."""
    model, tokenizer = tiny_model(name), tiny_tokenizer()
    ffns = find_ffns(model)
    each = [BY_HAND[pooling](both_ends(model, ffns[1], tokenizer(text)["input_ids"])[:, 1:]) for text in TEXTS]
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    session = Session(Base(model, tokenizer, name))
    found = pool_texts(session, TEXTS, pooling=pooling)[:, 1]
    assert torch.allclose(found, torch.stack(each).mean(0), atol=1e-5)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_words_are_pooled_over_all_their_tokens(session, pooling):
    """Each word is a sequence with a leading space."""
    model, tokenizer = session.base.model, session.base.tokenizer
    words = ["good", "town", "extraordinary"]
    ids = [tokenizer(f" {word}", add_special_tokens=False)["input_ids"] for word in words]
    each = [BY_HAND[pooling](both_ends(model, session.ffns[0], row)) for row in ids]
    found = pool_words(session, words, pooling=pooling)[:, 0]
    assert torch.allclose(found, torch.stack(each).mean(0), atol=1e-5)


def test_the_reference_of_texts_is_texts_and_that_of_words_is_words(session):
    """The state of the neutral texts and of the neutral words is 0."""
    for pooling in POOLINGS:
        of_texts = attribute_from_texts(session, "nothing", neutral_texts(), pooling=pooling)
        of_words = build_attribute(session, "nothing", built_in()["neutral"], pooling=pooling)
        assert float(of_texts.state.abs().max()) == 0 == float(of_words.state.abs().max())
        assert float((of_texts.reference - of_words.reference).abs().max()) > 0.01
