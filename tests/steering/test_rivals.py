"""Other ways to steer, measured beside ours in one sweep."""

from __future__ import annotations

import pytest
import torch

from braces_cli.cli import steer_settings
from braces_cli.core.attributes.directions import pair_states
from braces_cli.core.attributes.lookup import find_attribute
from braces_cli.core.attributes.pooling import STEERING_SHARE
from braces_cli.core.attributes.vector import attribute_from_texts
from braces_cli.core.errors import ConfigError
from braces_cli.evaluation.baselines import baseline_methods, contrast_pairs
from braces_cli.evaluation.sweep import at_equal_perplexity

TOKENS = torch.tensor([[0, 5, 6, 7, 8]])
PROMPTS = ["the film is", "a day", "the end of the old town", "a happy day in"]


@pytest.fixture
def positive(session):
    return find_attribute(session, "positive", None)


@pytest.mark.parametrize("name", ["difference", "pca"])
def test_a_direction_is_added_behind_the_layers_that_we_push(session, positive, name):
    """At s = 1 by as much of the residual norm; s = 0 is the bare model, and nothing stays behind."""
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


def test_rivals_steer_the_bare_base(session, positive, adapter_dir):
    from braces_cli.core.adapter.files import find_adapter

    with torch.no_grad():
        bare = session.base.model(TOKENS).logits
        session.add_adapter(find_adapter(str(adapter_dir)))
        assert not torch.equal(session.base.model(TOKENS).logits, bare)
        for method in baseline_methods(session, ["prompting", "pca"], positive, [1.0]):
            with method.steering(0.0):
                assert torch.equal(session.base.model(TOKENS).logits, bare)


def test_prompting_says_what_to_write(session, positive):
    (method,) = baseline_methods(session, ["prompting"], positive, [-2.0, 0.0, 3.0])
    assert method.strengths == [1.0, -1.0]
    assert method.inputs(["a day"], 1.0) == ["Write something positive: a day"]
    assert method.inputs(["a day"], -1.0) == ["Write something negative: a day"]
    (method,) = baseline_methods(session, ["prompting"], positive, [1.0])
    assert method.strengths == [1.0]
    texts = attribute_from_texts(session, "very_warm", ["a happy day"])
    (method,) = baseline_methods(session, ["prompting"], texts, [-1.0])
    assert method.inputs(["a day"], -1.0) == ["Write something not very warm: a day"]
    with pytest.raises(ConfigError, match="does not hold what it was built from"):
        baseline_methods(session, ["pca"], texts, [1.0])


def test_the_pairs_of_descriptions_are_made_again(session, tmp_path):
    """From what the attribute's file says of how it was made; those of plain texts it does not hold."""
    from braces_cli.core.attributes.build import PairReading, attribute_from_descriptions, description_pairs
    from braces_cli.core.attributes.vector import load_attributes, save_attributes

    sides = ["a cheerful person"], ["a gloomy person"]
    made = attribute_from_descriptions(session, "cheerful", *sides, PairReading(reduction="mean"))
    save_attributes(tmp_path / "cheerful.safetensors", [made])
    read = load_attributes(tmp_path / "cheerful.safetensors", session)["cheerful"]
    assert contrast_pairs(read) == description_pairs(*sides)


def test_all_stand_in_one_document_table_and_plot(braces, model_dir, tmp_path):
    asked = [part for prompt in PROMPTS for part in ("--prompt", prompt)]
    call = ["steer", "--model", model_dir, "--device", "cpu", "--max-new-tokens", 6, "--attribute", "positive", *asked]
    plain = braces(*call, "--sweep", "-20:20:20").json
    plot = tmp_path / "sweep.png"
    outcome = braces(*call, "--sweep", "-20:20:20", "--baselines", "prompting, pca", "--plot", plot)
    assert outcome.code == 0, outcome.err
    found = outcome.json
    assert found["points"] == plain["points"]  # the others change nothing of ours
    assert [(each["method"], [point["s"] for point in each["points"]]) for each in found["baselines"]] == [
        ("prompting", [1.0, -1.0]), ("pca", [-20.0, 0.0, 20.0])
    ]  # fmt: skip
    at_zero = found["baselines"][1]["points"][1]
    assert at_zero == found["unsteered"]
    instructed = [part for prompt in PROMPTS for part in ("--prompt", f"Write something positive: {prompt}")]
    texts = braces(*call[:-8], *instructed).lines
    assert found["baselines"][0]["points"][0]["distinct_1"] == pytest.approx(
        sum(_distinct(row["text"]) for row in texts) / 4
    )
    table = braces(*call, "--sweep", "-20:20:20", "--baselines", "difference", "--format", "table").out
    assert "other ways to steer" in table
    assert "at equal perplexity" in table
    assert plot.read_bytes().startswith(b"\x89PNG")


def _distinct(text):
    from braces_cli.scoring.scorers import distinct

    return distinct([[text]], 1)


def _point(s, score, perplexity):
    return {"s": s, "attribute_score": score, "perplexity": perplexity}


def test_scores_are_read_where_the_curve_reaches_the_perplexity():
    swept = {
        "unsteered": _point(0, 0.4, 10.0),
        "points": [_point(-1, 0.3, 9.0), _point(0, 0.4, 10.0), _point(2, 0.6, 20.0), _point(1, 0.5, 12.0)],
        "baselines": [{"method": "prompting", "points": [_point(1.0, 0.7, 13.0)]}],
    }
    rows = {(row["method"], row["side"], row["ratio"]): row for row in at_equal_perplexity(swept)}
    ours = rows["braces", 1, 1.5]
    # ln(15 / 12) of ln(20 / 12) of the way from s = 1 to s = 2.
    assert (ours["attribute_score"], ours["s"]) == pytest.approx((0.5437, 1.4368), abs=1e-4)
    assert ours["reached"]
    assert rows["braces", -1, 1.5] == {
        "method": "braces", "side": -1, "ratio": 1.5, "attribute_score": 0.3, "s": -1, "reached": False
    }  # fmt: skip
    assert rows["prompting", 1, 1.25]["reached"]
    assert not rows["prompting", 1, 1.5]["reached"]
    assert rows["prompting", 1, 1.5]["attribute_score"] == 0.7
    assert ("prompting", -1, 1.5) not in rows


def test_the_command_line_knows_the_methods(session, positive, braces, model_dir):
    assert [each.name for each in baseline_methods(session, steer_settings.BASELINE_METHODS, positive, [1.0])] == [
        *steer_settings.BASELINE_METHODS
    ]
    outcome = braces("steer", "--model", model_dir, "--attribute", "positive", "--sweep", "1", "--baselines", "pcaa")
    assert outcome.code == 2
    assert "Did you mean pca?" in outcome.err + outcome.out
