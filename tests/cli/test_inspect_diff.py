"""`braces inspect diff`: two models, two adapters, and pairs that cannot be compared."""

from __future__ import annotations

import math

import pytest
import torch

from tests.cli.test_app import imported_by
from tests.conftest import make_adapter, tiny_model, tiny_tokenizer


def save(model, folder, tokenizer=None):
    model.save_pretrained(folder)
    (tokenizer or tiny_tokenizer()).save_pretrained(folder)
    return folder


def test_help_stays_light():
    """No torch for a help page."""
    assert imported_by("from braces_cli.cli.app import main; main(['inspect', 'diff', '--help'])") == set()


def test_a_model_equals_itself(braces, model_dir):
    """Every vector, on every side."""
    found = braces("inspect", "diff", model_dir, model_dir, "--format", "json").json
    assert found["same_top_token"] == 1.0
    assert found["compared"] == 2 * 3 * 52
    assert {(row["layer"], row["side"]) for row in found["layers"]} == {
        (n, side) for n in (0, 1) for side in ("value", "gate", "up")
    }


def test_only_what_was_changed_differs(braces, model_dir, tmp_path, session):
    """Nine value vectors of layer 1 turned around: their best tokens change, nothing else's does."""
    model = session.base.model
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[:, :9] *= -1
    other = save(model, tmp_path / "other", session.base.tokenizer)
    found = braces("inspect", "diff", model_dir, other, "--format", "json").json
    shares = {(row["layer"], row["side"]): row["same_top_token"] for row in found["layers"]}
    assert shares.pop((1, "value")) == pytest.approx(43 / 52)
    assert set(shares.values()) == {1.0}
    assert found["same_top_token"] == pytest.approx(1 - 9 / 312)
    assert braces("inspect", "diff", model_dir, other).code == 0


def test_adapters(braces, session, tmp_path):
    """Angles of a subspace with itself are nought; with another as a direct computation has them."""
    from safetensors.torch import load_file

    a, b = (make_adapter(session, tmp_path / name, seed=seed) for name, seed in (("a", 1), ("b", 2)))
    found = braces("inspect", "diff", a, a, "--format", "json").json
    for row in found["layers"]:
        assert row["angles"] == pytest.approx([0] * 4, abs=1e-3)
        assert row["overlap"] == pytest.approx(1)
        assert row["gate_a"] == row["gate_b"]
    found = braces("inspect", "diff", a, b, "--format", "json").json
    assert (found["compared"], found["same_top_token"], found["same_base"]) == (2, None, True)
    files = [load_file(folder / "adapter_model.safetensors") for folder in (a, b)]
    for row in found["layers"]:
        one, two = (file[f"layers.{row['layer']}.projection"] for file in files)
        cosines = torch.linalg.svdvals(one @ two.T).clamp(max=1)
        expected = sorted((math.degrees(math.acos(c)) for c in cosines.tolist()), reverse=True)
        assert row["angles"] == pytest.approx(expected, abs=0.1)
        assert row["overlap"] == pytest.approx(float(cosines.pow(2).mean()), rel=1e-4)
        assert row["gate_b"] == pytest.approx(float(torch.sigmoid(files[1][f"layers.{row['layer']}.gate"])))
        assert "query_angles" not in row
    outcome = braces("inspect", "diff", a, b)
    assert outcome.code == 0
    assert [line.rstrip() for line in outcome.out.splitlines()[:2]] == [f"A {a}", f"B {b}"]


def test_adapters_that_differ_in_their_queries_alone(braces, session, tmp_path):
    """Where these have a projection of their own it is compared, too; a form with one projection has it for both."""
    from safetensors.torch import load_file, save_file

    names = ("a", "b", "tied")
    a, b, tied = (make_adapter(session, tmp_path / n, form="signed" if n == "tied" else "whitened") for n in names)
    file = b / "adapter_model.safetensors"
    tensors = load_file(file)
    for layer in (0, 1):
        query = torch.linalg.qr(torch.randn(32, 4, generator=torch.Generator().manual_seed(layer))).Q.T
        tensors[f"layers.{layer}.query_projection"] = query.contiguous()
    save_file(tensors, file)
    for row in braces("inspect", "diff", a, b, "--format", "json").json["layers"]:
        assert row["overlap"] == pytest.approx(1)
        query = load_file(a / "adapter_model.safetensors")[f"layers.{row['layer']}.query_projection"]
        cosines = torch.linalg.svdvals(query @ tensors[f"layers.{row['layer']}.query_projection"].T)
        assert row["query_overlap"] == pytest.approx(float(cosines.pow(2).mean()), rel=1e-3)
        assert len(row["query_angles"]) == 4
    for row in braces("inspect", "diff", a, tied, "--format", "json").json["layers"]:
        assert row["query_overlap"] is not None


def test_pairs_that_cannot_be_compared(braces, model_dir, adapter_dir, tmp_path):
    """Two lines each, with the right exit code."""
    from transformers import AddedToken

    words = tiny_tokenizer()
    words.add_tokens([AddedToken("zebra")])
    sizes = {"max_position_embeddings": 128, "vocab_size": 96}
    other = save(tiny_model("llama", **sizes), tmp_path / "words", words)
    wide = save(tiny_model("llama", **{**sizes, "intermediate_size": 40}), tmp_path / "wide")
    for pair, code, message in (
        ((model_dir, other), 4, "different vocabularies"),
        ((model_dir, wide), 4, "different sizes"),
        ((model_dir, adapter_dir), 2, "one is an adapter"),
        ((model_dir, tmp_path / "nowhere"), 4, "no such model folder"),
    ):
        outcome = braces("inspect", "diff", *pair)
        assert outcome.code == code
        assert message in outcome.err
        assert len(outcome.err.strip().splitlines()) <= 2
