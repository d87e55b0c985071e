"""Attributes: built through the bare base, and the axes of built-in lists."""

from __future__ import annotations


def test_the_same_words_give_the_same_state_with_and_without_an_adapter(session):
    """Words go through the bare base."""
    import torch

    from braces_cli.core.adapter.model import attach
    from braces_cli.core.attributes.vector import build_attribute
    from tests.conftest import open_gates

    before = build_attribute(session, "good", ["good"])
    session.adapter = attach(session.base.model, 4)
    open_gates(session.adapter)
    after = build_attribute(session, "good", ["good"])
    assert torch.equal(before.hidden, after.hidden)


def test_a_built_in_list_with_an_opposite_is_one_end_of_an_axis(braces, session, model_dir, tmp_path):
    """positive is minus negative; attr-build without words writes the same; a list without opposite keeps neutral."""
    import torch

    from braces_cli.core.attributes.lookup import find_attribute
    from braces_cli.core.attributes.vector import build_attribute
    from braces_cli.core.attributes.words import built_in

    one, other = (find_attribute(session, name, None) for name in ("positive", "negative"))
    assert torch.allclose(one.state, -other.state, atol=1e-6)
    ends = [build_attribute(session, name, built_in()[name]).hidden for name in ("positive", "negative")]
    assert torch.allclose(one.state, (ends[0] - ends[1]) / 2, atol=1e-6)
    args = ["attr-build", "--model", model_dir, "--device", "cpu", "--attribute", "positive", "--output-dir", tmp_path]
    assert braces(*args).code == 0
    assert torch.equal(find_attribute(session, "positive", tmp_path).state, one.state)
    angry = find_attribute(session, "angry", None)
    assert torch.equal(angry.reference, build_attribute(session, "mine", ["own"]).reference)
