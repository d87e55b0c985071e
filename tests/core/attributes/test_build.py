"""Attributes from words, lists, descriptions and pairs: states, directions, layers, files."""

from functools import partial

import pytest
import torch

from braces_cli.core.adapter.model import attach, open_session
from braces_cli.core.attributes import build
from braces_cli.core.attributes.directions import Pair, Passage, pair_states, reduce_pairs
from braces_cli.core.attributes.hooks import layer_steering
from braces_cli.core.attributes.lookup import find_attribute
from braces_cli.core.attributes.vector import STEERING_SHARE, save_attributes, with_steered_layers
from braces_cli.core.attributes.words import built_in, stems
from braces_cli.core.errors import ConfigError, DataError
from braces_cli.core.models.ffn import FFN, watch_output
from braces_cli.core.options import LoadOptions
from tests.conftest import open_gates

PAIRS = [
    Pair(Passage(f" {one} day", f"the {thing} is"), Passage(f" {other} day", f"the {thing} is"))
    for thing in ("film", "town", "end")
    for one, other in (("good", "sad"), ("happy", "old"))
]


@pytest.mark.parametrize("source", ["words", "pairs"])
def test_an_adapter_has_no_effect_on_an_attribute(session, source):
    def built():
        if source == "words":
            return build.build_attribute(session, "good", ["good"], reduction="gradient")
        return build.attribute_from_pairs(session, "good", PAIRS)

    bare = built()
    session.adapter = attach(session.base.model, 4)
    open_gates(session.adapter)
    again = built()
    for part in ("hidden", "reference", "residual", "scale", "direction"):
        assert torch.equal(getattr(bare, part), getattr(again, part)), part


def test_a_built_in_list_with_an_opposite_is_one_end_of_an_axis(braces, session, model_dir, tmp_path):
    """`attr-build` without words writes the same attribute; a list without an opposite has the neutral reference."""
    one, other = (find_attribute(session, name, None) for name in ("positive", "negative"))
    assert torch.allclose(one.state, -other.state, atol=1e-6)
    assert torch.allclose(one.direction, -other.direction, rtol=1e-4, atol=1e-7)
    ends = [build.build_attribute(session, name, built_in()[name]).hidden for name in ("positive", "negative")]
    assert torch.allclose(one.hidden - one.reference, (ends[0] - ends[1]) / 2, atol=1e-6)
    args = ["attr-build", "--model", model_dir, "--device", "cpu", "--attribute", "positive", "--output-dir", tmp_path]
    assert braces(*args).code == 0
    assert torch.equal(find_attribute(session, "positive", tmp_path).state, one.state)
    angry = find_attribute(session, "angry", None)
    assert torch.equal(angry.reference, build.build_attribute(session, "mine", ["own"]).reference)


def test_p_is_the_difference_of_means_and_the_direction_the_gradient(session, tmp_path):
    """An attribute that is read from its file has the same steering vector."""
    attribute = build.attribute_from_pairs(session, "good", PAIRS)
    for end, watch in enumerate((FFN.watch, watch_output)):
        states = pair_states(session, PAIRS, [partial(watch, ffn) for ffn in session.ffns])
        relevance = ("input", "output")[end]
        assert torch.allclose(attribute.state_at(relevance), reduce_pairs(states), atol=1e-6)
        assert torch.allclose(attribute.reference[end], states.middle, atol=1e-6)
    assert torch.equal(attribute.state, attribute.state_at("input"))
    assert attribute.provenance["reduction"] == "gradient"
    assert attribute.direction is not None
    assert [each.share for each in layer_steering(session, [(attribute, 1.0)])] == pytest.approx([STEERING_SHARE])
    save_attributes(tmp_path / "good.safetensors", [attribute])
    read = find_attribute(session, "good", tmp_path)
    assert read.provenance == attribute.provenance
    (one,), (other,) = (layer_steering(session, [(each, 2.0)]) for each in (attribute, read))
    assert one.layer == other.layer == 0
    assert torch.equal(one.vector, other.vector)
    assert torch.allclose(one.vector, 2.0 * attribute.scale[0] * attribute.direction[0])


def test_the_layers_of_an_attribute_share_its_strength(session, tmp_path):
    """In the file, too; `--layers` of a command takes precedence."""
    attribute = with_steered_layers(build.attribute_from_pairs(session, "good", PAIRS, reduction="mean"), [0, 1])
    save_attributes(tmp_path / "good.safetensors", [attribute])
    for each in (attribute, find_attribute(session, "good", tmp_path)):
        sizes = layer_steering(session, [(each, 1.0)])
        assert [size.layer for size in sizes] == [0, 1]
        assert [size.share for size in sizes] == pytest.approx([STEERING_SHARE / 2] * 2, rel=1e-4)
        assert [size.layer for size in layer_steering(session, [(each, 1.0)], [1])] == [1]
    with pytest.raises(ConfigError, match="none of these layers"):
        with_steered_layers(attribute, [7])


def test_auto_layers_separate_held_out_pairs_best(session):
    """There are as many as by default; too few pairs are an error."""
    assert build.best_layers([0, 1, 2, 3, 4], [0.1, 3.0, 0.2, 2.0, 2.5]) == [1, 3, 4]
    attribute = build.attribute_from_pairs(session, "good", PAIRS, reduction="mean", layers="auto")
    effects = [row["effect"] for row in attribute.provenance["separation"]]
    assert attribute.effective_layers == [effects.index(max(effects))]
    with pytest.raises(DataError, match="too few"):
        build.attribute_from_pairs(session, "good", PAIRS[:2], reduction="mean", layers="auto")


def test_descriptions_are_prompts_of_the_same_texts(session):
    """Every stem follows every template, once for each pair of descriptions."""
    pairs = build.description_pairs(["a happy man", "joy"], ["a sad man", "grief"])
    assert len(pairs) == len(stems()) * 6 * 2
    for pair in pairs:
        assert pair.positive.text == pair.negative.text
        assert pair.positive.prompt.replace("happy", "sad").replace("joy", "grief") == pair.negative.prompt
    attribute = build.attribute_from_descriptions(session, "mood", ["happy"], ["sad"], reduction="mean")
    assert (attribute.provenance["describe"], attribute.provenance["against"]) == (["happy"], ["sad"])
    assert not attribute.provenance["chat_template"]


def test_with_a_chat_template_descriptions_are_user_turns(chatty):
    """Unless it is off; requested without a chat template it is an error."""
    session = open_session(str(chatty), None, LoadOptions(device="cpu"))
    for chat in (None, False):
        built = build.attribute_from_descriptions(session, "mood", ["happy"], ["sad"], reduction="gradient", chat=chat)
        assert built.provenance["chat_template"] is (chat is None)
    session.base.tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="no chat template"):
        build.attribute_from_descriptions(session, "mood", ["happy"], ["sad"], chat=True)
