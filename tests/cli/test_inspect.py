"""`braces inspect`: the summary and the tokens of value vectors."""

from __future__ import annotations

import pytest
import torch


def test_summary_of_an_adapter_needs_no_weights(braces, adapter_dir, model_dir, monkeypatch):
    """Gates, projections and sizes of every layer; the base comes from the adapter's config."""
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *a, **k: pytest.fail("loaded the weights"))
    found = braces("inspect", "--adapter", adapter_dir, "--format", "json").json
    assert found["model"] == str(model_dir)
    assert found["parameters"] == 2 * (4 * 32 + 1)
    assert [layer["layer"] for layer in found["layers"]] == [0, 1]
    for layer in found["layers"]:
        assert set(layer) == {
            "layer", "value_vectors", "hidden_size", "gate", "relevance_scale", "projection_error",
        }  # fmt: skip
        assert (layer["value_vectors"], layer["hidden_size"]) == (52, 32)
        assert 0 < layer["gate"] < 1
        assert layer["relevance_scale"] == (1.5, 0.75)[layer["layer"]]
        assert layer["projection_error"] < 1e-5


def test_the_table_has_a_title_of_two_lines(braces, adapter_dir):
    """The base, then the adapter."""
    first, second = braces("inspect", "--adapter", adapter_dir).out.splitlines()[:2]
    assert first.rstrip().endswith(" parameters")
    assert second.startswith("adapter ")


def test_summary_reads_the_revision_of_the_adapters_base(braces, adapter_dir, monkeypatch):
    """An adapter of a base on a hub is held to the revision that it was trained on, unless another is named."""
    import json

    import braces_cli.inspection.summary as summary

    seen, load = [], summary.load_shape
    monkeypatch.setattr(summary, "load_shape", lambda name, **k: seen.append(k["revision"]) or load(name))
    path = adapter_dir / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"revision": "v2"}))
    for args in ((), ("--revision", "v3")):
        assert braces("inspect", "--adapter", adapter_dir, *args, "--format", "json").code == 0
    assert seen == ["v2", "v3"]


def test_summary_of_a_base_alone(braces, model_dir):
    """No gate, no error: null, not a made-up number."""
    found = braces("inspect", "--model", model_dir, "--format", "json").json
    assert found["adapter"] is None
    assert {layer["gate"] for layer in found["layers"]} == {None}


def test_values_equal_a_direct_computation(braces, model_dir, session):
    """LM head of the final norm of v_j, best first."""
    rows = braces("inspect", "values", "--model", model_dir, "--top-k", 5, "--format", "json").lines
    assert len(rows) == 2 * 52
    model = session.base.model
    for row in rows[::7]:
        v = model.model.layers[row["layer"]].mlp.down_proj.weight[:, row["index"]]
        best = model.lm_head(model.model.norm(v)).topk(5)
        assert [t["id"] for t in row["tokens"]] == best.indices.tolist()
        assert [t["score"] for t in row["tokens"]] == pytest.approx(best.values.tolist(), rel=1e-5)
        assert row["tokens"][0]["token"] == session.base.tokenizer.decode([row["tokens"][0]["id"]])


def test_layers_and_indices_are_chosen(braces, model_dir):
    """And the table shows the same rows."""
    args = ["inspect", "values", "--model", model_dir, "--layers", "1", "--index", "3,50-"]
    rows = braces(*args, "--format", "json").lines
    assert [(row["layer"], row["index"]) for row in rows] == [(1, 3), (1, 50), (1, 51)]
    assert braces(*args).code == 0


@pytest.mark.parametrize("name", ["gpt2", "opt", "gpt_neox", "phi"])
def test_the_final_norm_is_found_by_structure(name):
    """What the model applies to its last hidden state before the head."""
    from braces_cli.inspection.vocabulary import LogitLens, final_norm
    from tests.conftest import tiny_model

    model = tiny_model(name)
    seen = []
    handle = final_norm(model).register_forward_hook(lambda m, a, out: seen.append((a[0], out)))
    with torch.no_grad():
        logits = model(torch.tensor([[4, 5, 6]])).logits
    handle.remove()
    assert len(seen) == 1
    assert torch.allclose(LogitLens(model)(seen[0][0]), logits, atol=1e-4)


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["--index", "52"], 2, "out of range"),
        (["--layers", "2"], 2, "out of range"),
        (["--index", "x"], 2, "neither a number nor a range"),
    ],
)
def test_bad_input(braces, model_dir, args, code, message):
    """Two lines and the right code."""
    outcome = braces("inspect", "values", "--model", model_dir, *args)
    assert outcome.code == code
    assert message in outcome.err


def test_options_before_the_subcommand_are_refused(braces, model_dir):
    """They would be ignored otherwise."""
    outcome = braces("inspect", "--model", model_dir, "values")
    assert outcome.code == 2
    assert "before the subcommand" in outcome.err
