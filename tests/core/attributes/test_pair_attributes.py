"""Attributes from pairs and descriptions: what is stored, which layers are pushed, and files of before."""

from __future__ import annotations

import pytest
import torch

from braces_cli.core.adapter.model import attach, open_session
from braces_cli.core.attributes.build import (
    PairReading,
    attribute_from_descriptions,
    attribute_from_pairs,
    best_layers,
    description_pairs,
    stems,
)
from braces_cli.core.attributes.directions import Pair, Passage, pair_states, reduce_pairs
from braces_cli.core.attributes.hooks import constants, steered
from braces_cli.core.attributes.lookup import find_attribute
from braces_cli.core.attributes.pooling import STEERING_SHARE
from braces_cli.core.attributes.vector import built_in_attribute, save_attributes, with_steered_layers
from braces_cli.core.errors import ConfigError, DataError
from braces_cli.core.options import LoadOptions
from tests.conftest import open_gates

PAIRS = [
    Pair(Passage(f" {one} day", f"the {thing} is"), Passage(f" {other} day", f"the {thing} is"))
    for thing in ("film", "town", "end")
    for one, other in (("good", "sad"), ("happy", "old"))
]


def test_the_state_is_the_difference_of_means_and_the_push_the_gradient(session, tmp_path):
    """Both sides of the middle; what is read back pushes by the same vectors."""
    attribute = attribute_from_pairs(session, "good", PAIRS)
    states = pair_states(session, PAIRS)
    assert torch.allclose(attribute.state, reduce_pairs(states), atol=1e-6)
    assert torch.allclose(attribute.reference, states.middle, atol=1e-6)
    assert attribute.provenance["reduction"] == "gradient"
    assert attribute.direction is not None
    with steered(session, [(attribute, 1.0)]) as sizes:
        assert [size.share for size in sizes] == pytest.approx([STEERING_SHARE], rel=1e-4)
    save_attributes(tmp_path / "good.safetensors", [attribute])
    read = find_attribute(session, "good", tmp_path)
    assert read.provenance == attribute.provenance
    vectors, again = (constants(session, [(each, 2.0)]) for each in (attribute, read))
    assert vectors.keys() == again.keys() == {0}
    assert torch.equal(vectors[0], again[0])
    expected = 2.0 * attribute.scale[0] * attribute.direction[0]
    assert torch.allclose(vectors[0], expected)


def test_an_adapter_stays_out_of_it(session):
    """Of the norms of the residual stream, too, which say how far the attribute pushes."""
    bare = attribute_from_pairs(session, "good", PAIRS)
    session.adapter = attach(session.base.model, 4)
    open_gates(session.adapter)
    again = attribute_from_pairs(session, "good", PAIRS)
    for part in ("hidden", "reference", "residual", "scale", "direction"):
        assert torch.equal(getattr(bare, part), getattr(again, part)), part


def test_other_reductions_push_along_their_own_state(session):
    """Without a direction besides it."""
    for reduction in ("mean", "pca", "logistic"):
        attribute = attribute_from_pairs(session, "good", PAIRS, PairReading(reduction))
        assert attribute.direction is None
        assert torch.allclose(attribute.state, reduce_pairs(pair_states(session, PAIRS), reduction), atol=1e-6)


def test_layers_that_an_attribute_names_are_pushed_and_together_by_the_same_share(session, tmp_path):
    """Also after reading it back; --layers of a command goes before them."""
    attribute = with_steered_layers(attribute_from_pairs(session, "good", PAIRS, PairReading("mean")), [0, 1])
    save_attributes(tmp_path / "good.safetensors", [attribute])
    read = find_attribute(session, "good", tmp_path)
    for each in (attribute, read):
        with steered(session, [(each, 1.0)]) as sizes:
            assert [(size.layer, size.share) for size in sizes] == [
                (layer, pytest.approx(STEERING_SHARE / 2, rel=1e-4)) for layer in (0, 1)
            ]
        with steered(session, [(each, 1.0)], [1]) as sizes:
            assert [size.layer for size in sizes] == [1]
    with pytest.raises(ConfigError, match="none of these layers"):
        with_steered_layers(attribute, [7])


def test_layers_are_chosen_by_how_well_they_separate_held_out_pairs(session):
    """As many as by default; of too few pairs none can be."""
    assert best_layers([0, 1, 2, 3, 4], [0.1, 3.0, 0.2, 2.0, 2.5]) == [1, 3, 4]
    attribute = attribute_from_pairs(session, "good", PAIRS, PairReading("mean", layers="auto"))
    effects = [row["effect"] for row in attribute.provenance["separation"]]
    assert attribute.effective_layers == [effects.index(max(effects))]
    with pytest.raises(DataError, match="too few"):
        attribute_from_pairs(session, "good", PAIRS[:2], PairReading("mean", layers="auto"))


def test_descriptions_stand_in_front_of_the_same_texts(session):
    """Every stem behind every template, once for each pair of descriptions; only the stem is pooled over."""
    pairs = description_pairs(["a happy man", "joy"], ["a sad man", "grief"])
    assert len(pairs) == len(stems()) * 6 * 2
    for pair in pairs:
        assert pair.positive.text == pair.negative.text
        assert pair.positive.prompt.replace("happy", "sad").replace("joy", "grief") == pair.negative.prompt
    attribute = attribute_from_descriptions(session, "mood", ["happy"], ["sad"], PairReading("mean"))
    assert (attribute.provenance["describe"], attribute.provenance["against"]) == (["happy"], ["sad"])
    assert not attribute.provenance["chat_template"]


@pytest.mark.parametrize(("one", "other"), [([], []), (["a"], []), (["a"], [" "]), (["a", "b"], ["c"])])
def test_descriptions_that_do_not_go_together_are_refused(one, other):
    """None, blank, or not as many."""
    with pytest.raises(ConfigError):
        description_pairs(one, other)


def test_with_a_chat_template_descriptions_are_a_users_turn(chatty):
    """Unless it is switched off; asked for where there is none it is an error."""
    session = open_session(str(chatty), None, LoadOptions(device="cpu"))
    made = [
        attribute_from_descriptions(session, "mood", ["happy"], ["sad"], PairReading("gradient", chat=chat)).provenance
        for chat in (None, False)
    ]
    assert [each["chat_template"] for each in made] == [True, False]
    session.base.tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="no chat template"):
        attribute_from_descriptions(session, "mood", ["happy"], ["sad"], PairReading("mean", chat=True))


def test_a_built_in_list_pushes_along_the_gradient_with_an_adapter_too(session, adapter_dir):
    """The bare base's; opposite ends push opposite ways."""
    ends = [find_attribute(session, name, None) for name in ("joyful", "sad")]
    assert ends[0].direction is not None
    assert ends[1].direction is not None
    assert torch.allclose(ends[0].direction, -ends[1].direction, rtol=1e-4, atol=1e-7)
    assert built_in_attribute(session, "joyful").direction is None
    trained = open_session(session.base.name, str(adapter_dir), LoadOptions(device="cpu"))
    assert torch.equal(find_attribute(trained, "joyful", None).direction, ends[0].direction)
