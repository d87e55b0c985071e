"""Merged checkpoints: the adapter's logits and tokens without the adapter."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from braces_cli.core.adapter.files import find_adapter
from braces_cli.core.adapter.model import attach, open_session
from braces_cli.core.attributes.hooks import erased_directions
from braces_cli.core.attributes.lookup import find_attribute
from braces_cli.core.errors import ModelError
from braces_cli.core.models.ffn import find_ffns, watch_output
from braces_cli.core.models.structure import add_to_output
from braces_cli.core.models.weights import StoredValues
from braces_cli.core.options import LoadOptions
from braces_cli.export.checkpoint import ValueEdit, edit_values, export_merge, value_edits, write_edited
from braces_cli.export.plan import Plan
from braces_cli.export.run import Request
from tests.conftest import make_adapter, tiny_model, tiny_tokenizer
from tests.core.architectures import tiny
from tests.core.comparison import relative
from tests.export.columns import write_merged
from tests.export.models import MODELS, SHIFT, TOKENS, frozen, greedy, logits, names, with_adapter

# The case of `export.plan` of each model.
CASES = {
    "llama": "a", "qwen2": "b", "mistral": "b", "phi3": "b", "gpt2": "c", "gpt_neox": "c", "opt": "c", "phi": "c",
}  # fmt: skip


def merged(model: Any, folder: Path, steered: bool, vectors: dict[int, torch.Tensor] | None = None) -> tuple[Plan, Any]:
    """Merge an adapter on layer 1 of 2, so that layer 0 must not change; returns plan and merged model."""
    adapter = with_adapter(model, SHIFT if steered else None, [1])
    found = write_merged(model, adapter, folder, TOKENS, steered, vectors)
    loaded, info = AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return found, loaded.eval()


@pytest.mark.parametrize("steered", [False, True], ids=["side path", "steered"])
@pytest.mark.parametrize("name", CASES)
def test_a_merged_model_has_the_adapters_logits_and_tokens(name: str, steered: bool, tmp_path: Path) -> None:
    """float32: logits within 1e-5, equal greedy tokens, width a multiple of 64, tied embeddings still tied."""
    model = MODELS[name]()
    bare = logits(model)
    plan, loaded = merged(model, tmp_path, steered)
    adapter = with_adapter(model, SHIFT if steered else None, [1])
    expected = logits(model)
    assert relative(bare, expected) > 1e-2, "the adapter has no effect"
    assert relative(logits(loaded), expected) < 1e-5
    assert torch.equal(greedy(loaded), greedy(model))
    assert (plan.case, plan.wider % 64) == (CASES[name], 0)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) == tied
    adapter.detach()
    assert torch.equal(logits(model), bare)


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_a_steering_vector_is_merged_with_the_adapter(name: str, tmp_path: Path) -> None:
    """In the layer with the adapter, and in the layer without."""
    model = MODELS[name]()
    vectors = {layer: 0.3 * torch.randn(32, generator=torch.Generator().manual_seed(layer)) for layer in (0, 1)}
    _, loaded = merged(model, tmp_path, True, vectors)
    with_adapter(model, SHIFT, [1])
    alone = logits(model)
    for ffn in find_ffns(model):
        ffn.value.register_forward_hook(lambda module, args, output, layer=ffn.layer: output + vectors[layer])
    assert relative(alone, logits(model)) > 1e-2, "the steering vector has no effect"
    assert relative(logits(loaded), logits(model)) < 1e-5


@pytest.mark.parametrize("name", CASES)
def test_the_bfloat16_error_of_a_merge_is_at_most_twice_that_of_the_base(name: str, tmp_path: Path) -> None:
    """Both relative to float32 with the same weights."""
    model = MODELS[name]().to(torch.bfloat16)
    _, loaded = merged(model, tmp_path, True)
    low = logits(model)
    wide = model.float()
    of_base = float((low - logits(wide)).square().mean().sqrt())
    with_adapter(wide, SHIFT, [1])
    of_merge = float((logits(loaded) - logits(wide)).square().mean().sqrt())
    assert of_merge <= 2 * of_base


def test_the_command_writes_a_verified_checkpoint_and_verifies_it_again(
    braces: Any, model_dir: Path, adapter_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_process: None
) -> None:
    """Tokenizer and record are in the folder; --check works from every working directory, and finds damage.

    The record has absolute paths of adapter and attributes.
    """
    monkeypatch.chdir(tmp_path)
    build = ("attr-build", "--model", model_dir, "--attribute", "mine", "--words", "good,happy", "--output-dir", "own")
    assert braces(*build).code == 0
    steer = ("--attribute", "mine", "--s", 2, "--attributes", "own")
    done = braces("merge", "--adapter", adapter_dir.name, *steer, "--output-dir", "merged", "--format", "json")
    assert done.code == 0, done.err
    found, out = done.json, tmp_path / "merged"
    assert found["architecture"] == "LlamaForCausalLM"
    assert found["neurons_added"] == 12  # 52 + 4 = 56, padded to 64
    assert found["probes"] == 8
    assert found["max_logit_difference"] < 1e-4 < found["adapter_effect"]
    assert "tokenizer.json" in names(out)
    assert str(found["probes"]) in (out / "README.md").read_text()
    assert names(tmp_path) == ["adapter", "merged", "own"], "a temporary folder is left"
    (tmp_path / "else").mkdir()
    monkeypatch.chdir(tmp_path / "else")
    again = braces("merge", "--check", "../merged", "--format", "json")
    assert again.code == 0, again.err
    assert again.json["max_logit_difference"] == found["max_logit_difference"]
    assert names(tmp_path / "else") == []
    tensors = load_file(out / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][:, 53] *= 1.01
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    damaged = braces("merge", "--check", out)
    assert damaged.code == 4
    assert "its logits differ from the adapter's" in damaged.err


def test_the_tokenizers_class_is_written_if_the_model_type_chose_it(tmp_path: Path, in_process: None) -> None:
    """A Qwen2 whose tokenizer files name no class is written as a Llama."""
    tiny_model("qwen2", vocab_size=120, max_position_embeddings=128).save_pretrained(tmp_path / "base")
    tiny_tokenizer().backend_tokenizer.model.save(str(tmp_path / "base"))  # vocab.json and merges.txt only
    session = open_session(str(tmp_path / "base"), None, LoadOptions(device="cpu"))
    kind = type(session.base.tokenizer).__name__
    assert kind == "Qwen2Tokenizer"
    adapter = find_adapter(str(make_adapter(session, tmp_path / "adapter")))
    found = export_merge(Request(None, adapter, LoadOptions(device="cpu"), tmp_path / "out"))
    assert found["architecture"] == "LlamaForCausalLM"
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == kind


@pytest.mark.parametrize("steer", [(), ("--attribute", "positive", "--s", 2)], ids=["side path", "steered"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_relevance_to_the_output_adds_no_neurons(braces, output_dir, model_dir, tmp_path, steer, dtype, in_process):
    """The tensors of the base, with edited value vectors, and biases for an attribute; --check finds damage."""
    out = tmp_path / "merged"
    call = ("merge", "--adapter", output_dir, *steer, "--dtype", dtype, "--output-dir", out, "--format", "json")
    done = braces(*call)
    assert done.code == 0, done.err
    assert (done.json["architecture"], done.json["neurons_added"]) == ("LlamaForCausalLM", 0)
    assert done.json["max_logit_difference"] < (1e-4 if dtype == "float32" else 0.02) < done.json["adapter_effect"]
    assert done.json["effect_missing"] < 0.1
    assert "edited value vectors" in (out / "README.md").read_text()
    base, tensors = load_file(model_dir / "model.safetensors"), load_file(out / "model.safetensors")
    added = sorted(set(tensors) - set(base))
    assert bool(added) == bool(steer)
    assert all(name.endswith(".bias") for name in added)
    changed = [name for name in base if not torch.equal(tensors[name], base[name].to(tensors[name].dtype))]
    assert changed == [f"model.layers.{layer}.mlp.down_proj.weight" for layer in (0, 1)]
    assert braces("merge", "--check", out).code == 0
    tensors["model.layers.1.mlp.down_proj.weight"] *= 1.5
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    assert braces("merge", "--check", out).code == 4


@pytest.mark.parametrize("shift", [None, SHIFT], ids=["side path", "with a shift"])
@pytest.mark.parametrize("layers", [(), (0, 1)], ids=["alone", "with steering vectors"])
def test_biases_are_edited_with_the_value_vectors(layers, shift, tmp_path):
    """Steering vectors also in layer 0, which has no adapter."""
    model = MODELS["gpt2"]()
    adapter = with_adapter(model, shift, [1], relevance_to="output")
    vectors = {layer: 0.3 * torch.randn(32, generator=torch.Generator().manual_seed(layer)) for layer in layers}
    ffns = find_ffns(model)
    hooks = [add_to_output(ffns[layer].output_module, vector) for layer, vector in vectors.items()]
    expected = logits(model)
    missing = edit_values(model, value_edits(adapter, ffns, vectors))
    adapter.detach()
    for hook in hooks:
        hook.remove()
    assert write_edited(tmp_path, model, ffns, missing, TOKENS) == "GPT2LMHeadModel"
    assert relative(logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval()), expected) < 1e-5


@pytest.mark.parametrize(("name", "hint"), [("qwen3", "--combine"), ("qwen3_moe", "braces steer")])
def test_an_attribute_without_a_bias_is_refused(name: str, hint: str, tmp_path: Path) -> None:
    """The hint has the command that works."""
    model = MODELS[name]()
    adapter = frozen(attach(model, 4, relevance_to="output"), SHIFT)
    missing = edit_values(model, value_edits(adapter, find_ffns(model), {}))
    adapter.detach()
    with pytest.raises(ModelError, match="cannot take an attribute in a bias") as caught:
        write_edited(tmp_path, model, find_ffns(model), missing, TOKENS)
    assert hint in str(caught.value.hint)


def test_shared_or_packed_value_vectors_are_not_edited() -> None:
    """Two layers with one weight; a weight that is not a plain tensor; a vector after a mixture of experts."""
    model = tiny_model("llama")
    first, second = (layer.mlp for layer in model.model.layers)
    adapter = attach(model, 4, relevance_to="output")
    second.down_proj.weight = first.down_proj.weight
    with pytest.raises(ModelError, match="layer 0 shares its value vectors"):
        edit_values(model, value_edits(adapter, find_ffns(model), {}))
    packed: Any = SimpleNamespace(values=lambda: StoredValues(first), bias=lambda: None)
    with pytest.raises(ModelError, match="its weights are quantised"):
        edit_values(model, [ValueEdit(0, packed, torch.zeros(4, 32), torch.zeros(32, 4), None, None)])
    model = MODELS["qwen3_moe"]()
    adapter = attach(model, 4, relevance_to="output")
    with pytest.raises(ModelError, match="after a mixture of experts"):
        list(value_edits(adapter, find_ffns(model), {1: torch.ones(32)}))


ERASED = [
    *((name, None) for name in ("gpt2", "opt", "qwen3_moe", "gpt_oss", "llama4_text", "deepseek_v3", "gemma3_text")),
    ("llama", "input"), ("llama", "output"), ("gpt2", "input"), ("gpt2", "output"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "relevance"), ERASED)
def test_an_erased_direction_is_not_written(name, relevance, braces, tmp_path, in_process):
    """Weights, biases, routed and shared experts, norms after the FFN, adapters; two attributes, layer 1 of 2 or more.

    The checkpoint has the logits of `steer --erase`, which are compared by the export.
    """
    model = MODELS[name]() if name in MODELS else tiny(name)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("bias"):
            parameter.data.normal_(generator=torch.Generator().manual_seed(0))
    model.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    session = open_session(str(tmp_path / "base"), None, LoadOptions(device="cpu"))
    attributes = [find_attribute(session, each, None, for_steering=False) for each in ("toxic", "angry")]
    call = ["--model", tmp_path / "base", "--device", "cpu", "--layers", "1"]
    if relevance is not None:
        call += ["--adapter", make_adapter(session, tmp_path / "adapter", relevance_to=relevance)]
    out = tmp_path / "out"
    named = ("--attribute", "toxic", "--attribute", "angry")
    done = braces("export", "erase", *call, *named, "--output-dir", out, "--format", "json")
    assert done.code == 0, done.err
    assert done.json["adapter_effect"] > 1e-4 > done.json["max_logit_difference"]
    assert list(done.json["remaining"]) == ["1"]
    assert "toxic, angry erased" in (out / "README.md").read_text()
    if relevance == "input":
        write = ("--prompt", "the film", "--temperature", 0, "--max-new-tokens", 12, "--format", "json")
        (text,) = braces("steer", "--model", out, "--device", "cpu", *write).lines
        steered = braces("steer", *call, "--erase", "toxic", "--erase", "angry", *write)
        assert text["text"] == steered.lines[0]["text"]
        share = 100 * done.json["remaining"]["1"]
        assert f"toxic, angry erased; {share:.1f}% of it remains in the residual stream after layer 1" in steered.err
    loaded, parts = AutoModelForCausalLM.from_pretrained(out).eval(), {}
    for ffn in find_ffns(loaded):
        watch_output(ffn, lambda y, layer=ffn.layer: parts.update({layer: y.reshape(-1, y.shape[-1])}))
    logits(loaded)
    for layer, erased in ((0, False), (1, True)):
        basis = erased_directions(session, attributes, [layer])[layer]
        assert basis.shape[1] == 2
        assert (float((parts[layer] @ basis).norm() / parts[layer].norm()) < 1e-5) == erased


@pytest.mark.parametrize(("relevance", "added"), [("input", 12), ("output", 0)])
def test_a_dry_run_needs_no_weights(braces: Any, session: Any, tmp_path: Path, relevance: str, added: int) -> None:
    adapter = make_adapter(session, tmp_path / "adapter", relevance_to=relevance)
    done = braces("merge", "--adapter", adapter, "--output-dir", "out", "--dry-run", "--format", "json")
    assert (done.code, done.json["architecture"], done.json["neurons_added"]) == (0, "LlamaForCausalLM", added)
    assert done.json["settings"]["pad_to_multiple_of"] == 64
    base = sum(p.numel() for p in tiny_model("llama").parameters())
    assert (done.json["total_parameters"] == base) == (added == 0)
