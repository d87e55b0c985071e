"""Steering: attributes add up, sizes, the paper's formula, strengths per row."""

from dataclasses import replace

import pytest
import torch

from braces_cli.core.adapter.model import Session, attach
from braces_cli.core.adapter.reference import reference
from braces_cli.core.attributes.build import build_attribute
from braces_cli.core.attributes.hooks import erased_directions, layer_steering, steered, terms_of_rows
from braces_cli.core.attributes.vector import Attribute
from braces_cli.core.errors import ConfigError
from braces_cli.core.models.ffn import find_ffns, layer_stack
from braces_cli.core.models.generate import prompt_lengths
from braces_cli.core.models.load import Base
from braces_cli.core.models.structure import layer_output, uncompiled
from braces_cli.core.models.tokenize import IGNORED, decode_continuation, encode
from braces_cli.core.options import Sampling
from braces_cli.scoring.likelihood import continuation_likelihoods
from braces_cli.steering.texts import generate_texts, text_requests
from tests.conftest import open_gates, tiny_model, tiny_tokenizer
from tests.core.architectures import tiny
from tests.core.comparison import relative

TOKENS = torch.tensor([[0, 5, 6, 7]])


def test_attributes_add_up(session):
    """Logits of A + B are those of the sum of vectors; s = 2 of A is A twice; s = 0 changes nothing."""
    good = build_attribute(session, "good", ["good", "happy"])
    old = build_attribute(session, "old", ["old", "town"])

    def logits(*terms):
        with steered(session, terms) as sizes, torch.no_grad():
            return session.base.model(TOKENS).logits, sizes

    for relevance in (None, "input", "output"):
        session.remove_adapter()
        if relevance is not None:
            session.adapter = attach(session.base.model, 4, relevance_to=relevance)
            open_gates(session.adapter)
        with torch.no_grad():
            bare = session.base.model(TOKENS).logits
        both, total = logits((good, 2.0), (old, -1.0))
        swapped, _ = logits((old, -1.0), (good, 2.0))
        doubled, sizes = logits((good, 1.0), (good, 1.0))
        single, twice = logits((good, 2.0))
        _, rest = logits((old, -1.0))
        for each, one, other in zip(total, twice, rest, strict=True):
            assert torch.allclose(each.total, one.total + other.total, atol=1e-6)
        assert torch.allclose(both, swapped, atol=1e-5)
        assert torch.allclose(doubled, single, atol=1e-5)
        assert [each.share for each in sizes] == pytest.approx([each.share for each in twice])
        none, nothing = logits((good, 0.0))
        assert torch.equal(none, bare)
        assert nothing == []
        # No hook remains.
        assert torch.equal(logits()[0], bare)


def test_strength_one_is_ten_percent_of_the_residual(session):
    """All default layers together; a layer that `layers` names has the share of one default layer."""
    good = build_attribute(session, "good", ["good", "happy"])
    assert [each.share for each in layer_steering(session, [(good, 1.0)])] == pytest.approx([0.1], rel=1e-4)
    (second,) = layer_steering(session, [(good, -2.0)], [1])
    assert (second.layer, round(second.share, 4)) == (1, 0.2)


@pytest.mark.parametrize("name", ["granite", "gemma2", "olmo2"])
def test_strength_one_moves_the_stream_by_ten_percent_with_a_factor_or_norm_after_the_ffn(name):
    """Measured at the output of the steered layer, at s = 0.2 so that a norm is nearly linear."""
    model = tiny(name)
    if name == "granite":
        for layer in model.model.layers:
            layer.residual_multiplier = 0.22
    session = Session(Base(model, tiny_tokenizer(), name))
    good = build_attribute(session, "good", ["good", "happy"])
    states = []
    layer_stack(model)[1][0].register_forward_hook(lambda m, a, output: states.append(layer_output(output)))
    tokens = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model(tokens)
        with steered(session, [(good, 0.2 * len(good.effective_layers))], layers=[0]) as sizes:
            model(tokens)
    moved = float(((states[1] - states[0]).norm(dim=-1) / states[0].norm(dim=-1)).median())
    assert [size.share for size in sizes] == [pytest.approx(0.02, rel=1e-3)]
    assert moved == pytest.approx(0.02, rel=0.1 if name == "granite" else 0.5)


@pytest.mark.parametrize("relevance", ["input", "output"])
def test_steering_through_an_adapter_is_the_formula(session, relevance):
    """r_i + s r_c at every layer, against the reference; h_c is pooled where the adapter reads."""
    session.adapter = attach(session.base.model, 4, relevance_to=relevance)
    open_gates(session.adapter)
    good = build_attribute(session, "good", ["good", "happy"])
    state = (good.hidden - good.reference)[("input", "output").index(relevance)]
    with torch.no_grad():
        with steered(session, [(good, 3.0)]):
            fast = session.base.model(TOKENS).logits
        with reference(session.adapter, {layer: [(state[i], 3.0)] for i, layer in enumerate(good.layers)}):
            slow = session.base.model(TOKENS).logits
    assert float((fast - slow).abs().max() / slow.abs().max()) < 1e-5


def test_a_steering_vector_is_added_next_to_the_adapter(session):
    """In the layers of its attribute; other attributes go through the adapter, and the sum is what the FFN gets."""
    good, old = build_attribute(session, "good", ["good"]), build_attribute(session, "old", ["old"])
    direction = torch.randn(good.state.shape, generator=torch.Generator().manual_seed(0))
    direct = replace(good, direction=direction, steered_layers=[0])
    session.adapter = attach(session.base.model, 4)
    open_gates(session.adapter)
    terms = [(direct, 2.0), (old, 3.0)]
    vector = 2 * direct.scale[0] * direction[0]
    first, second = layer_steering(session, terms)
    through = layer_steering(session, [(old, 3.0)])
    assert torch.allclose(first.vector, vector)
    assert second.vector is None
    assert torch.allclose(first.total, through[0].total + vector, atol=1e-6)
    assert torch.equal(second.total, through[1].total)
    for row, each in enumerate((first, second)):
        assert each.share == pytest.approx(float(each.total.norm() / good.residual[row]), rel=1e-5)

    seen = []
    with torch.no_grad():
        for steering in ([], terms):
            with steered(session, steering):
                hook = session.ffns[0].host.register_forward_hook(lambda module, args, output: seen.append(output))
                session.base.model(TOKENS)
                hook.remove()
    moved = (seen[1] - seen[0]).reshape(-1, first.total.shape[1])
    assert torch.allclose(moved, first.total.expand_as(moved), atol=1e-5)


def test_a_compiled_model_is_steered_and_restored():
    """After its first pass, when it has a graph already; an adapter can be attached and detached."""
    model = tiny_model(num_hidden_layers=1)
    session = Session(Base(model, tiny_tokenizer(), "tiny"))

    def passes():
        with torch.no_grad():
            for length in (4, 3):
                model(TOKENS[:, :length], use_cache=False)
            with uncompiled(model):
                good = build_attribute(session, "good", ["good"])
            bare = model(TOKENS).logits
            with steered(session, [(replace(good, direction=good.state), 9.0)]):
                steered_logits = model(TOKENS).logits
            restored = model(TOKENS).logits
            session.adapter = attach(model, 4)
            open_gates(session.adapter)
            adapted = model(TOKENS).logits
            session.remove_adapter()
            return [bare, steered_logits, restored, adapted, model(TOKENS).logits]

    plain = passes()
    model.compile(backend="eager")
    compiled = passes()
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(plain, compiled, strict=True))
    assert not torch.allclose(plain[0], plain[1], atol=1e-3)
    assert not torch.allclose(plain[0], plain[3], atol=1e-3)


@pytest.mark.parametrize("scope", ["all", "prompt", "generated"])
@pytest.mark.parametrize("name", ["llama", "opt", "bloom", "mixtral", "llama4_text", "gemma2"])
def test_rows_with_steering_vectors_and_rows_through_the_adapter_share_a_batch(name, scope):
    """With the adapter on the last layer and vectors on all; each row against itself alone, and the formula.

    OPT flattens (batch, tokens, d) before its FFN. A row at s = 0 has no attribute. Each row has another prompt length.
    """
    model = tiny(name)
    ffns = find_ffns(model)
    layers, width = [ffn.layer for ffn in ffns], ffns[0].hidden_size
    session = Session(Base(model, None, name))
    session.adapter = attach(model, 4, layers[-1:])
    open_gates(session.adapter)
    generator = torch.Generator().manual_seed(1)

    def drawn():
        return torch.randn(2, len(layers), width, generator=generator)

    norms = torch.full((len(layers),), 3.0 * len(layers) * width**0.5)
    known = {each: Attribute(each, [], drawn(), drawn(), norms, layers, {}, norms) for each in "bc"}
    known["a"] = Attribute("a", [], drawn(), drawn(), norms, layers, {}, norms, direction=drawn()[0])
    known["a"] = replace(known["a"], steered_layers=layers)
    rows = [{"a": 1.0}, {"b": 2.0, "c": -1.0}, {}, {"a": -1.0, "b": 0.5}, {"a": 0.0}]
    tokens, lengths = torch.randint(3, 90, (5, 7), generator=generator), torch.tensor([[3], [1], [6], [5], [2]])

    def logits(rows, tokens, lengths=lengths, scope=scope):
        terms = terms_of_rows(known.__getitem__, rows)
        with steered(session, terms, scope=scope) as sizes, torch.no_grad(), prompt_lengths(lengths):
            return model(tokens, use_cache=False).logits, {size.layer: size.share for size in sizes}

    mixed, shares = logits(rows, tokens)
    largest = dict.fromkeys(layers, 0.0)
    for k, row in enumerate(rows):
        alone, own = logits([row], tokens[k : k + 1], lengths[k : k + 1])
        assert relative(mixed[k], alone[0]) < 1e-5, k
        largest |= {layer: max(share, largest[layer]) for layer, share in own.items()}
    assert shares == pytest.approx(largest)
    terms = [(known[each].state[-1], torch.tensor(s)) for each, s in rows[1].items()]
    with reference(session.adapter, {layers[-1]: terms}), torch.no_grad():
        whole, _ = logits(rows, tokens, scope="all")
        assert relative(whole[1], model(tokens[1:2], use_cache=False).logits[0]) < 1e-5
    bare, _ = logits([{}] * 5, tokens)
    assert all(relative(mixed[k], bare[k]) > 1e-3 for k in (0, 1, 3))
    # The rows of a mixture share the products of its experts, and their rounding.
    if scope == "generated":
        assert all(relative(mixed[k, : lengths[k]], bare[k, : lengths[k]]) <= 1e-6 for k in range(5))
    limit = 1e-6 if name in ("mixtral", "llama4_text") else 0.0
    assert all(relative(mixed[k], bare[k]) <= limit for k in (2, 4))


@pytest.mark.parametrize("scope", ["all", "prompt", "generated"])
@pytest.mark.parametrize("kind", ["vector", "adapter", "erased"])
def test_scope_in_generation_and_likelihood(session, kind, scope):
    """A batch with a cache against whole passes over one row, with some tokens changed by hand."""
    good = replace(build_attribute(session, "good", ["good", "happy"]), steered_layers=[0, 1])
    if kind != "vector":
        session.adapter = attach(session.base.model, 4)
        open_gates(session.adapter)
    terms, erase, start = [(good, -40.0)], {}, [0]
    if kind == "erased":
        others = [replace(good, hidden=torch.randn(good.hidden.shape)) for _ in range(20)]
        terms, erase = [], erased_directions(session, [good, *others])
        assert {u.shape[1] for u in erase.values()} == {21}
    vectors = {each.layer: each.total for each in layer_steering(session, terms)}

    def add(layer, output):
        places = torch.arange(output.shape[1])
        chosen = {"all": places >= 0, "prompt": places < start[0], "generated": places >= start[0]}[scope]
        change = vectors[layer] if terms else -(output @ erase[layer]) @ erase[layer].mT
        return output + chosen[None, :, None] * change

    def logits(ids, length):
        start[0] = length
        handles = [
            ffn.host.register_forward_hook(lambda m, a, y, layer=ffn.layer: add(layer, y)) for ffn in session.ffns
        ]
        with torch.no_grad():
            found = session.base.model(torch.tensor([ids]), use_cache=False).logits[0]
        for handle in handles:
            handle.remove()
        return found

    prompts, expected = ["the film is", "a", "the end of the old town"], []
    for prompt in prompts:
        ids = session.base.tokenizer(prompt)["input_ids"]
        length = len(ids)
        for _ in range(6):
            ids.append(int(logits(ids, length)[-1].argmax()))
        expected.append(decode_continuation(session.base.tokenizer, ids[:length], ids[length:]))
    with steered(session, terms, scope=scope, erase=erase):
        found = list(generate_texts(session, text_requests(prompts), Sampling(6, temperature=0), batch_size=3))
        pairs = list(zip(prompts, [" good day", " happy", " old town the film"], strict=True))
        nll = [each.nll for each in continuation_likelihoods(session.base, pairs, 3)]
    assert found == expected
    for (prompt, text), value in zip(pairs, nll, strict=True):
        row = encode(session.base.tokenizer, prompt, text)
        length = row.labels.count(IGNORED)
        log_p = logits(row.ids, length).log_softmax(dim=-1)[length - 1 : -1]
        assert value == pytest.approx(-float(log_p.gather(1, torch.tensor(row.ids[length:])[:, None]).sum()), rel=1e-4)


def test_a_layer_that_the_adapter_lacks_is_refused(session):
    """`--layers` names a layer without relevance module, and the attribute goes through the adapter."""
    good = replace(build_attribute(session, "good", ["good", "happy"]), direction=None)
    session.adapter = attach(session.base.model, 4, [0])
    with pytest.raises(ConfigError, match="no layer 1"):
        layer_steering(session, [(good, 1.0)], [0, 1])
