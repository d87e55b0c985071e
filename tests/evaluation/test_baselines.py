"""Baselines for a sweep: prompting, difference of means, principal component."""

from __future__ import annotations

import pytest
import torch

from braces_cli.core.attributes.build import attribute_from_texts
from braces_cli.core.attributes.directions import pair_states
from braces_cli.core.attributes.lookup import find_attribute
from braces_cli.core.attributes.vector import STEERING_SHARE
from braces_cli.core.errors import ConfigError
from braces_cli.evaluation.baselines import baseline_methods, contrast_pairs
from braces_cli.scoring.scorers import distinct
from braces_cli.steering.settings import BASELINE_METHODS

TOKENS = torch.tensor([[0, 5, 6, 7, 8]])


PROMPTS = ["the film is", "a day", "the end of the old town", "a happy day in"]


@pytest.fixture
def positive(session):
    return find_attribute(session, "positive", None)


@pytest.mark.parametrize("name", ["difference", "pca"])
def test_a_direction_is_added_after_the_steered_layers(session, positive, name):
    """At s = 1 by the share of the residual norm; at s = 0 the model is bit-identical."""
    (method,) = baseline_methods(session, [name], positive, [1.0])
    model = session.base.model
    states = pair_states(session, contrast_pairs(positive), captured="output")
    difference = (states.positive[0] - states.negative[0]).mean(dim=0)
    seen: list[torch.Tensor] = []
    handle = model.model.layers[0].register_forward_hook(lambda m, a, output: seen.append(output[0, -1].clone()))
    with torch.no_grad():
        bare = model(TOKENS).logits
        with method.steering(1.0):
            handle.remove()
            handle = model.model.layers[0].register_forward_hook(lambda m, a, output: seen.append(output[0, -1]))
            moved = model(TOKENS).logits
        with method.steering(0.0):
            assert torch.equal(model(TOKENS).logits, bare)
        assert torch.equal(model(TOKENS).logits, bare)
    handle.remove()
    assert not torch.allclose(moved, bare)
    added = seen[1] - seen[0]
    assert positive.effective_layers == [0]
    assert float(added.norm()) == pytest.approx(STEERING_SHARE * float(positive.residual[0]), rel=1e-3)
    assert float(added @ difference) > 0
    if name == "difference":
        assert float(torch.cosine_similarity(added, difference, dim=0)) == pytest.approx(1, abs=1e-4)


def test_baselines_steer_the_base_without_its_adapter(session, positive, adapter_dir):
    from braces_cli.core.adapter.files import find_adapter

    with torch.no_grad():
        bare = session.base.model(TOKENS).logits
        session.add_adapter(find_adapter(str(adapter_dir)))
        assert not torch.equal(session.base.model(TOKENS).logits, bare)
        for method in baseline_methods(session, ["prompting", "pca"], positive, [1.0]):
            with method.steering(0.0):
                assert torch.equal(session.base.model(TOKENS).logits, bare)


def test_prompting_puts_an_instruction_before_each_prompt(session, positive):
    (method,) = baseline_methods(session, ["prompting"], positive, [-2.0, 0.0, 3.0])
    assert method.strengths == [1.0, -1.0]
    assert method.inputs(["a day"], 1.0) == ["Write something positive: a day"]
    assert method.inputs(["a day"], -1.0) == ["Write something negative: a day"]
    (method,) = baseline_methods(session, ["prompting"], positive, [1.0])
    assert method.strengths == [1.0]
    texts = attribute_from_texts(session, "very_warm", ["a happy day"])
    (method,) = baseline_methods(session, ["prompting"], texts, [-1.0])
    assert method.inputs(["a day"], -1.0) == ["Write something not very warm: a day"]
    with pytest.raises(ConfigError, match="was built from texts"):
        baseline_methods(session, ["pca"], texts, [1.0])


def test_pairs_of_descriptions_are_built_from_the_attribute_file(session, tmp_path):
    from braces_cli.core.attributes.build import attribute_from_descriptions, description_pairs
    from braces_cli.core.attributes.vector import load_attributes, save_attributes

    sides = ["a cheerful person"], ["a gloomy person"]
    built = attribute_from_descriptions(session, "cheerful", *sides, reduction="mean")
    save_attributes(tmp_path / "cheerful.safetensors", [built])
    read = load_attributes(tmp_path / "cheerful.safetensors", session)["cheerful"]
    assert contrast_pairs(read) == description_pairs(*sides)


def test_baselines_are_in_document_table_and_plot(braces, model_dir, tmp_path):
    given = [part for prompt in PROMPTS for part in ("--prompt", prompt)]
    call = ["steer", "--model", model_dir, "--device", "cpu", "--max-new-tokens", 6, "--attribute", "positive", *given]
    plain = braces(*call, "--sweep", "-20:20:20").json
    plot = tmp_path / "sweep.png"
    outcome = braces(*call, "--sweep", "-20:20:20", "--baselines", "prompting, pca", "--plot", plot)
    assert outcome.code == 0, outcome.err
    found = outcome.json
    assert found["points"] == plain["points"]
    assert [(each["method"], [point["s"] for point in each["points"]]) for each in found["baselines"]] == [
        ("prompting", [1.0, -1.0]), ("pca", [-20.0, 0.0, 20.0])
    ]  # fmt: skip
    at_zero = found["baselines"][1]["points"][1]
    assert at_zero == found["unsteered"]
    instructed = [part for prompt in PROMPTS for part in ("--prompt", f"Write something positive: {prompt}")]
    texts = braces(*call[:-8], *instructed).lines
    assert found["baselines"][0]["points"][0]["distinct_1"] == pytest.approx(
        sum(distinct([[row["text"]]], 1) for row in texts) / 4
    )
    table = braces(*call, "--sweep", "-20:20:20", "--baselines", "difference", "--format", "table").out
    assert "other ways to steer" in table
    assert "at equal perplexity" in table
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_all_methods_are_built(session, positive):
    assert [each.name for each in baseline_methods(session, BASELINE_METHODS, positive, [1.0])] == [*BASELINE_METHODS]
