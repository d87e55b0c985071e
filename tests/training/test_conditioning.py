"""Training with attributes: opposites, gradients of the MLP, files, and steering afterwards."""

import json

import pytest
import torch
from safetensors.torch import load_file

from braces_cli.core.adapter.layer import WIDTH
from braces_cli.core.adapter.model import attach, open_session
from braces_cli.core.adapter.reference import reference
from braces_cli.core.attributes.build import build_attribute
from braces_cli.core.attributes.hooks import layer_steering, steered
from braces_cli.core.attributes.lookup import find_attribute
from braces_cli.core.options import LoadOptions
from braces_cli.data.dataset import Condition
from braces_cli.training.conditioning import Conditioner
from tests.conftest import open_gates
from tests.core.comparison import relative


@pytest.mark.parametrize("relevance", ["input", "output"])
def test_gradients_of_the_mlp_equal_the_reference(session, relevance):
    """h_c = p + (MLP(p) - MLP(-p)) / 2 in the formula of the paper, with attribute and strength per row."""
    model = session.base.model
    attributes = [build_attribute(session, name, [name]) for name in ("good", "old")]
    adapter = attach(model, 4, relevance_to=relevance)
    open_gates(adapter)
    mlp = adapter.add_mlp(seed=3)
    with torch.no_grad():
        mlp.down.weight.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    conditioner = Conditioner(adapter, attributes)
    rows = [Condition("good", 1.5, ""), Condition("old", -2.0, ""), Condition(None, 0.0, "")]
    strengths = conditioner.strengths(rows)
    assert strengths.tolist() == [[1.5, 0.0], [0.0, -2.0], [0.0, 0.0]]
    tokens = torch.randint(3, 90, (3, 7), generator=torch.Generator().manual_seed(1))

    def run(use_reference):
        model.zero_grad()
        if use_reference:
            pooled = [a.hidden - a.reference for a in attributes]
            states = mlp(torch.stack([p[("input", "output").index(relevance)] for p in pooled]))
            terms = {
                layer: [(states[k, i], strengths[:, k]) for k in range(2)] for i, layer in enumerate(adapter.layers)
            }
            with reference(adapter, terms):
                logits = model(tokens).logits
        else:
            conditioner.apply(strengths)
            logits = model(tokens).logits
            conditioner.clear()
        logits.logsumexp(-1).square().mean().backward()
        return logits.detach(), [
            p.grad.clone() for p in (*mlp.parameters(), *(b.weight for _, b in adapter.adapted_ffns))
        ]

    fast, fast_grads = run(False)
    slow, slow_grads = run(True)
    assert relative(fast, slow) < 1e-5
    for ours, theirs in zip(fast_grads, slow_grads, strict=True):
        assert relative(ours, theirs) < 3e-5


FIELDS = ("--attribute-field", "mood", "--strength-field", "how")


@pytest.mark.parametrize("relevance", ["input", "output"])
def test_training_with_attributes(train, mood_rows, tmp_path, relevance):
    """Steering towards an attribute raises the likelihood of its sentence; steering away lowers it."""
    out = tmp_path / "out"
    options = ("--max-steps", 40, "--rank", 8, "--lr", 0.03, "--gate-lr", 0.3, "--opposites", "positive:negative")
    outcome = train(out, "--eval-data", mood_rows, "--relevance-to", relevance, *options, *FIELDS)
    assert outcome.code == 0, outcome.err
    assert outcome.json["condition_parameters"] == 32 * WIDTH + WIDTH + WIDTH * 32
    assert outcome.json["trainable_parameters"] == 2 * (2 * 8 * 32 + 8 if relevance == "output" else 8 * 32 + 1)
    assert outcome.json["eval_loss"] < outcome.json["base_eval_loss"]
    assert (out / "attributes.safetensors").is_file()
    assert {name for name in load_file(out / "adapter_model.safetensors") if name.startswith("condition.")}
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["attributes"] == ["negative", "positive"]

    session = open_session(None, str(out), LoadOptions(device="cpu"))
    tokenizer, model = session.base.tokenizer, session.base.model
    positive = find_attribute(session, "positive", None)
    assert torch.allclose(positive.state, -find_attribute(session, "negative", None).state, atol=1e-6)
    tokens = torch.tensor([tokenizer("the film is")["input_ids"]])
    good, sad = (tokenizer(f" {w}", add_special_tokens=False)["input_ids"][0] for w in ("good", "sad"))

    def preference(s):
        with steered(session, [(positive, s)]), torch.no_grad():
            scores = model(tokens).logits[0, -1]
        return float(scores[good] - scores[sad])

    assert preference(1.5) > preference(0) > preference(-1.5)
    assert preference(1.5) > 0 > preference(-1.5)


def test_trained_attribute_and_its_file(train, braces, model_dir, tmp_path):
    """The trained attribute steers through the adapter; the same attribute from the file as a steering vector."""
    built = ("--model", model_dir, "--attribute", "positive", "--words", "good,happy", "--output-dir", tmp_path / "a")
    assert braces("attr-build", *built).code == 0
    assert train(tmp_path / "out", "--max-steps", 2, *FIELDS, "--attributes", tmp_path / "a").code == 0
    session = open_session(None, str(tmp_path / "out"), LoadOptions(device="cpu"))
    trained, file = (find_attribute(session, "positive", folder) for folder in (None, tmp_path / "a"))
    assert torch.equal(trained.state, file.state)
    assert [(each.layer, each.vector) for each in layer_steering(session, [(trained, 2.0)])] == [(0, None), (1, None)]
    assert [(each.layer, each.shift) for each in layer_steering(session, [(file, 2.0)])] == [(0, None)]


def test_mlp_is_odd(session):
    """h_c(-p) = -h_c(p), so strength s of one attribute is strength -s of its opposite."""
    mlp = attach(session.base.model, 4).add_mlp(seed=3)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in mlp.parameters():
            parameter.normal_(generator=generator)
    state = torch.randn(3, 32, generator=generator)
    found = mlp(state).detach()
    assert torch.equal(mlp(-state), -found)
    up = torch.nn.functional.gelu(state @ mlp.up.weight.T + mlp.up.bias)
    down = torch.nn.functional.gelu(-state @ mlp.up.weight.T + mlp.up.bias)
    assert torch.allclose(found, state + (up - down) @ mlp.down.weight.T / 2, rtol=1e-5, atol=1e-5)
    assert (found - state).norm() > state.norm()
