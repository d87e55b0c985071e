"""The laws of steering: attributes add up, the size of a push, the paper's formula."""

from __future__ import annotations

import pytest


def test_attributes_add_up(session):
    """Logits of A + B are those of the summed push; s = 2 of A is A twice."""
    import torch

    from braces_cli.core.adapter.model import attach
    from braces_cli.core.attributes.hooks import steered
    from braces_cli.core.attributes.vector import build_attribute
    from tests.conftest import open_gates

    good = build_attribute(session, "good", ["good", "happy"])
    old = build_attribute(session, "old", ["old", "town"])
    tokens = torch.tensor([[0, 5, 6, 7]])

    def logits(*terms):
        with steered(session, terms) as sizes, torch.no_grad():
            return session.base.model(tokens).logits, sizes

    for attached in (False, True):
        if attached:
            session.adapter = attach(session.base.model, 4)
            open_gates(session.adapter)
        with torch.no_grad():
            bare = session.base.model(tokens).logits
        both, _ = logits((good, 2.0), (old, -1.0))
        swapped, _ = logits((old, -1.0), (good, 2.0))
        doubled, sizes = logits((good, 1.0), (good, 1.0))
        single, twice = logits((good, 2.0))
        assert torch.allclose(both, swapped, atol=1e-5)
        assert torch.allclose(doubled, single, atol=1e-5)
        assert [p.share for p in sizes] == pytest.approx([p.share for p in twice])
        none, nothing = logits((good, 0.0))
        assert torch.equal(none, bare)
        assert nothing == []
        assert torch.equal(logits()[0], bare)  # and nothing stays behind


def test_without_training_strength_one_is_ten_percent_of_the_residual(session):
    """In all, over the first half of the layers, by the definition of the scale; where layers are named, there."""
    from braces_cli.core.attributes.hooks import steered
    from braces_cli.core.attributes.vector import build_attribute

    good = build_attribute(session, "good", ["good", "happy"])
    with steered(session, [(good, 1.0)]) as sizes:
        assert [p.share for p in sizes] == pytest.approx([0.1], rel=1e-4)
    with steered(session, [(good, -2.0)], layers=[1]) as sizes:
        assert [(p.layer, round(p.share, 4)) for p in sizes] == [(1, 0.2)]


@pytest.mark.parametrize("name", ["granite", "gemma2", "olmo2"])
def test_strength_one_moves_the_stream_by_ten_percent_whatever_stands_behind_the_ffn(name):
    """A number or a norm: measured at the output of the pushed layer, at s = 0.2 so that a norm is nearly linear."""
    import torch

    from braces_cli.core.adapter.model import Session
    from braces_cli.core.attributes.hooks import steered
    from braces_cli.core.attributes.vector import build_attribute
    from braces_cli.core.models.ffn import layer_stack
    from braces_cli.core.models.load import Base
    from braces_cli.core.models.structure import layer_output
    from tests.conftest import tiny_tokenizer
    from tests.core.architectures import tiny

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


def test_steering_with_an_adapter_is_the_papers_formula(session):
    """r_i + s r_c at every layer, against the reference."""
    import torch

    from braces_cli.core.adapter.model import attach
    from braces_cli.core.adapter.reference import reference
    from braces_cli.core.attributes.hooks import steered
    from braces_cli.core.attributes.vector import build_attribute
    from tests.conftest import open_gates

    session.adapter = attach(session.base.model, 4)
    open_gates(session.adapter)
    good = build_attribute(session, "good", ["good", "happy"])
    tokens = torch.tensor([[0, 5, 6, 7]])
    with torch.no_grad():
        with steered(session, [(good, 3.0)]):
            fast = session.base.model(tokens).logits
        with reference(session.adapter, {layer: [(good.state[i], 3.0)] for i, layer in enumerate(good.layers)}):
            slow = session.base.model(tokens).logits
    assert float((fast - slow).abs().max() / slow.abs().max()) < 1e-5


def test_a_direction_pushes_beside_the_adapter_and_the_rest_goes_through_it(session):
    """In the layers of the attribute, adapter or not; what is added is what `constants` says, with both at once."""
    from dataclasses import replace

    import torch

    from braces_cli.core.adapter.model import attach
    from braces_cli.core.attributes.hooks import constants, steered, steering_vectors
    from braces_cli.core.attributes.vector import build_attribute
    from tests.conftest import open_gates

    good, old = build_attribute(session, "good", ["good"]), build_attribute(session, "old", ["old"])
    direction = torch.randn(good.state.shape, generator=torch.Generator().manual_seed(0))
    pushing = replace(good, direction=direction, scale=torch.tensor([0.2, 0.3]), steered_layers=[0])
    session.adapter = attach(session.base.model, 4)
    open_gates(session.adapter)
    terms = [(pushing, 2.0), (old, 3.0)]
    assert list(steering_vectors(session, terms)) == [0]
    assert torch.allclose(steering_vectors(session, terms)[0], 2 * 0.2 * direction[0])
    through = constants(session, [(old, 3.0)])
    both = constants(session, terms)
    assert torch.allclose(both[0], through[0] + 2 * 0.2 * direction[0], atol=1e-6)
    assert torch.equal(both[1], through[1])
    with steered(session, terms) as sizes:
        # What is said of a layer is the sum of both.
        shares = {size.layer: size.share for size in sizes}
        assert len(sizes) == 2
    for row, layer in enumerate(good.layers):
        assert shares[layer] == pytest.approx(float(both[layer].norm() / good.residual[row]), rel=1e-5)

    tokens, seen = torch.tensor([[0, 5, 6, 7]]), []
    first = session.ffns[0]
    with torch.no_grad():
        for steering in ([], terms):
            with steered(session, steering):
                hook = first.host.register_forward_hook(lambda module, args, output: seen.append(output))
                session.base.model(tokens)
                hook.remove()
    moved = (seen[1] - seen[0]).reshape(-1, both[0].shape[0])
    assert torch.allclose(moved, both[0].expand_as(moved), atol=1e-5)


def test_a_compiled_model_is_steered_and_set_free_again(session):
    """Also after its first pass, when it has its graph already; the adapter is attached to it and taken off again. An
    attribute is built from it as from any other."""
    from dataclasses import replace

    import torch

    from braces_cli.core.adapter.model import attach
    from braces_cli.core.attributes.hooks import steered
    from braces_cli.core.attributes.vector import build_attribute
    from braces_cli.core.models.structure import uncompiled
    from tests.conftest import open_gates

    tokens, model = torch.tensor([[0, 5, 6, 7]]), session.base.model

    def passes():
        with torch.no_grad():
            for length in (4, 3, 2):
                model(tokens[:, :length], use_cache=False)
            with uncompiled(model):
                good = build_attribute(session, "good", ["good"])
            terms = [(replace(good, direction=good.state, scale=torch.tensor([0.2, 0.3]), steered_layers=[0]), 9.0)]
            bare = model(tokens).logits
            with steered(session, terms):
                steered_logits = model(tokens).logits
            freed = model(tokens).logits
            session.adapter = attach(model, 4)
            open_gates(session.adapter)
            adapted = model(tokens).logits
            session.remove_adapter()
            return [bare, steered_logits, freed, adapted, model(tokens).logits]

    plain = passes()
    model.compile(backend="eager")
    compiled = passes()
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(plain, compiled, strict=True))
    assert not torch.allclose(plain[0], plain[1], atol=1e-3)
    assert not torch.allclose(plain[0], plain[3], atol=1e-3)
