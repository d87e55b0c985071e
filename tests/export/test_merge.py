"""Merged checkpoints: the adapter's numbers without the adapter; whatever cannot be exact is refused."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig

from braces_cli.core.adapter.files import find_adapter
from braces_cli.core.adapter.model import Adapter, attach, open_session
from braces_cli.core.errors import ConfigError, ModelError
from braces_cli.core.models.ffn import find_ffns
from braces_cli.core.options import LoadOptions
from braces_cli.export.checkpoint import new_neurons, write_checkpoint
from braces_cli.export.form import Plan, constant_gate, is_half_linear, observed_form
from braces_cli.export.merge import merge
from braces_cli.export.planner import plain_ffns, plan
from braces_cli.export.request import Request
from braces_cli.export.verify import reference
from tests.conftest import GATED, make_adapter, open_gates, tiny_model, tiny_tokenizer
from tests.core.architectures import tiny
from tests.core.invariants import relative

TOKENS = torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(0))
# Name of the case, how the tiny base is made, and the case of `export.form` it must be.
BASES: dict[str, tuple[dict[str, Any], str]] = {
    "llama": ({}, "a"),
    "qwen2": ({"tie_word_embeddings": True}, "b"),
    "mistral": ({"sliding_window": None}, "b"),
    "gpt2": ({"n_positions": 128}, "c"),
    "gpt_neox": ({}, "c"),
    "opt": ({}, "c"),
    "phi": ({}, "c"),
}


def phi3(**overrides: Any) -> Any:
    """A tiny Phi-3, whose gate and up are one projection, and so are its q, k and v."""
    import transformers

    settings = {**GATED, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 1, **overrides}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(transformers.Phi3Config(**settings))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4) if parameter.ndim > 1 else parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def base(name: str) -> Any:
    return phi3() if name == "phi3" else tiny_model(name, **BASES[name][0])


def carry(model: Any, steered: bool) -> Adapter:
    """An adapter of rank 4 on one layer of two, so that the other must stay as it is, with or without steering."""
    adapter = attach(model, 4, [1])
    open_gates(adapter)
    for _, adapter_layer in adapter.adapted_ffns:
        adapter_layer.requires_grad_(False)
        adapter_layer.shift = torch.tensor([1.0, -2.0, 0.5, 3.0]) if steered else None
    return adapter


def written(
    model: Any, steered: bool, folder: Path, steering: dict[int, torch.Tensor] | None = None, form: str = "paper"
) -> tuple[Plan, Any]:
    """The plan, and the merged model as plain transformers loads it."""
    ffns = plain_ffns(model, find_ffns(model))
    made = plan(model, ffns, observed_form(model, ffns, TOKENS), 4, 64, steered)
    adapter = carry(model, steered)
    neurons = new_neurons(adapter, made, steering)
    adapter.detach()
    write_checkpoint(folder, model, made, neurons, [ffn.layer for ffn in ffns])
    merged, info = AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return made, merged.eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS, use_cache=False).logits.float()


def greedy(model: Any) -> torch.Tensor:
    config = GenerationConfig(max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=1)
    with torch.no_grad():
        return model.generate(TOKENS[:, :4], generation_config=config)


@pytest.mark.parametrize("steered", [False, True], ids=["token path", "steered"])
@pytest.mark.parametrize("name", [*BASES, "phi3"])
def test_a_merged_model_gives_the_adapters_numbers_and_tokens(name: str, steered: bool, tmp_path: Path) -> None:
    """float32: logits within 1e-5, 64 greedy tokens the same, width a multiple of 64, tied embeddings still tied."""
    model = base(name)
    bare = logits(model)
    made, merged = written(model, steered, tmp_path)
    adapter = carry(model, steered)
    expected = logits(model)
    assert relative(bare, expected) > 1e-2, "the adapter does nothing"
    assert relative(logits(merged), expected) < 1e-5
    assert torch.equal(greedy(merged), greedy(model))
    assert made.case == ("b" if name == "phi3" else BASES[name][1])
    assert made.wider % 64 == 0
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert (merged.get_output_embeddings().weight is merged.get_input_embeddings().weight) == tied
    adapter.detach()
    assert torch.equal(logits(model), bare)


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_a_push_is_merged_beside_the_adapter(name: str, tmp_path: Path) -> None:
    """In the layer that has the adapter, and in the one that has none."""
    model = base(name)
    steering = {layer: 0.3 * torch.randn(32, generator=torch.Generator().manual_seed(layer)) for layer in (0, 1)}
    _, merged = written(model, True, tmp_path, steering)
    carry(model, True)
    alone = logits(model)
    for ffn in find_ffns(model):
        ffn.value.register_forward_hook(lambda module, args, output, layer=ffn.layer: output + steering[layer])
    assert relative(alone, logits(model)) > 1e-2, "the push does nothing"
    assert relative(logits(merged), logits(model)) < 1e-5


@pytest.mark.parametrize("name", [*BASES, "phi3"])
def test_bfloat16_costs_a_merged_model_no_more_than_twice_what_it_costs_the_base(name: str, tmp_path: Path) -> None:
    """Against the same weights computed with in float32."""
    model = base(name).to(torch.bfloat16)
    _, merged = written(model, True, tmp_path)
    low = logits(model)
    wide = model.float()
    own = float((low - logits(wide)).square().mean().sqrt())
    carry(wide, True)
    found = float((logits(merged) - logits(wide)).square().mean().sqrt())
    assert found <= 2 * own


def planned(model: Any) -> Plan:
    ffns = plain_ffns(model, find_ffns(model))
    return plan(model, ffns, observed_form(model, ffns, TOKENS), 4, 64, False)


REFUSED = {
    "gemma": ("gemma", {}, "its activation is"),
    "qwen3": ("qwen3", {}, "a Llama has no model.layers.0.self_attn.k_norm.weight"),
    "mistral with a window": ("mistral", {"sliding_window": 16}, "sliding_window is 16"),
    "phi3 with a window": ("phi3", {"sliding_window": 16}, "sliding_window is 16"),
    "bloom": ("bloom", {}, "fixes the width of the FFN"),
    "mixtral": ("mixtral", {}, "it mixes experts"),
    "arcee": ("arcee", {}, "does not hold"),
    "gemma3n_text": ("gemma3n_text", {}, "different widths"),
    "falcon_h1": ("falcon_h1", {}, "computes something else"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_exact_is_refused_with_the_reason(case: str) -> None:
    """Exit code 4, the reason, and what works instead."""
    name, overrides, words = REFUSED[case]
    model = phi3(**overrides) if name == "phi3" else tiny_model(name, **overrides) if overrides else tiny(name)
    with pytest.raises(ModelError, match="cannot be merged") as caught:
        planned(model)
    assert words in caught.value.message
    assert "braces export code" in str(caught.value.hint)
    # No control vector is written for a mixture.
    assert ("control-vector" in str(caught.value.hint)) == (name != "mixtral")


def test_positions_far_apart_tell_a_llama_from_what_only_looks_like_one() -> None:
    """Ministral 3 weighs queries beyond the length of its first training, which short texts do not show: no Llama."""
    import transformers

    rope = {
        "rope_type": "default",
        "rope_theta": 1e4,
        "llama_4_scaling_beta": 0.5,
        "original_max_position_embeddings": 64,
    }
    sizes = {**GATED, "max_position_embeddings": 256, "rope_parameters": rope, "sliding_window": None}
    model = AutoModelForCausalLM.from_config(transformers.Ministral3Config(**sizes)).eval()
    with pytest.raises(ModelError, match="a Llama's logits differ"):
        planned(model)


def test_activations_are_told_by_what_they_do() -> None:
    """Half-linear ones, and constants that come through a gate unrounded in every dtype."""
    gelu = torch.nn.functional.gelu
    for activation in (gelu, torch.nn.functional.silu, torch.nn.functional.relu, lambda z: gelu(z, approximate="tanh")):
        assert is_half_linear(activation)
        assert constant_gate(activation) == (32.0, 32.0)
    assert not is_half_linear(lambda z: torch.nn.functional.relu(z) ** 2)
    assert not is_half_linear(torch.nn.functional.mish)
    assert constant_gate(torch.nn.functional.sigmoid) == (32.0, 1.0)


@pytest.fixture
def request_(model_dir: Path, adapter_dir: Path) -> Request:
    return Request(str(model_dir), find_adapter(str(adapter_dir)), LoadOptions(device="cpu"))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.slow
def test_the_command_writes_a_proved_checkpoint_and_proves_it_again(
    braces: Any, model_dir: Path, adapter_dir: Path, tmp_path: Path
) -> None:
    """By plain transformers in a process without braces; tokenizer and record beside it; --check finds damage."""
    out = tmp_path / "merged"
    call = (
        "merge",
        "--adapter",
        adapter_dir,
        "--attribute",
        "positive",
        "--s",
        2,
        "--output-dir",
        out,
        "--format",
        "json",
    )
    done = braces(*call)
    assert done.code == 0, done.err
    found = done.json
    assert found["architecture"] == "LlamaForCausalLM"
    assert found["neurons_added"] == 12  # 52 + 4 = 56, padded to 64
    assert found["probes"] == 8
    assert found["max_logit_difference"] < 1e-4 < found["adapter_effect"]
    assert "tokenizer.json" in names(out)
    assert str(found["probes"]) in (out / "README.md").read_text()
    assert names(tmp_path) == ["adapter", "merged"], "nothing half-written stays"
    again = braces("merge", "--check", out, "--format", "json")
    assert again.code == 0, again.err
    assert again.json["max_logit_difference"] == found["max_logit_difference"]
    tensors = load_file(out / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][:, 53] *= 1.01
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    damaged = braces("merge", "--check", out)
    assert damaged.code == 4
    assert "its logits differ from the adapter's" in damaged.err


def test_a_failed_proof_leaves_nothing(request_: Request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What stood in the output folder stays, even with --overwrite."""

    def fail(folder: Path, expected: Any) -> None:
        assert (folder / "model.safetensors").is_file()
        raise ModelError("no merge")

    monkeypatch.setattr("braces_cli.export.merge.verify_export", fail)
    out = tmp_path / "out"
    out.mkdir()
    (out / "kept.txt").write_text("kept")
    with pytest.raises(ModelError, match="no merge"):
        merge(request_, out, overwrite=True)
    assert names(out) == ["kept.txt"]
    assert names(tmp_path) == ["adapter", "out"]


def test_inputs_are_never_written_into(request_: Request, model_dir: Path, adapter_dir: Path) -> None:
    """Output inside the base, the base inside the output, the adapter itself: refused before anything is loaded."""
    for output in (model_dir / "merged", model_dir.parent, model_dir, adapter_dir):
        with pytest.raises(ConfigError, match=r"overlaps|not empty"):
            merge(request_, output, overwrite=output != adapter_dir)


def test_the_working_directory_is_no_output(request_: Request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--output-dir .` and folders above, empty or not: where it is empty, another folder takes its place."""
    here = tmp_path / "above" / "here"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    for output, overwrite in ((Path("."), False), (Path("."), True), (Path(".."), True), (here, True)):
        with pytest.raises(ConfigError, match="cannot hold the working directory"):
            merge(request_, output, overwrite)
    assert names(here) == []


@pytest.mark.slow
def test_a_check_works_from_every_working_directory(
    braces: Any, model_dir: Path, adapter_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record names local inputs by absolute paths; attributes of a folder are found, too."""
    monkeypatch.chdir(tmp_path)
    build = ("attr-build", "--model", model_dir, "--attribute", "mine", "--words", "good,happy", "--output-dir", "own")
    assert braces(*build).code == 0
    steer = ("--attribute", "mine", "--s", "2", "--attributes", "own")
    done = braces("merge", "--adapter", adapter_dir.name, *steer, "--output-dir", "merged", "--format", "json")
    assert done.code == 0, done.err
    (tmp_path / "else").mkdir()
    monkeypatch.chdir(tmp_path / "else")
    again = braces("merge", "--check", "../merged", "--format", "json")
    assert again.code == 0, again.err
    assert again.json["max_logit_difference"] == done.json["max_logit_difference"]
    assert names(tmp_path / "else") == []


def test_an_adapter_of_another_base_is_refused(request_: Request, tmp_path: Path) -> None:
    """Exit code 4, nothing written."""
    other = tmp_path / "other"
    tiny_model("llama", seed=1, max_position_embeddings=128).save_pretrained(other)
    tiny_tokenizer().save_pretrained(other)
    with pytest.raises(ModelError, match="another base"):
        merge(Request(str(other), request_.adapter, request_.options), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_tokenizers_class_is_named_where_the_type_of_the_model_chose_it(tmp_path: Path) -> None:
    """A Qwen2 whose tokenizer file names no class is written as a Llama, and read as before."""
    import json

    tiny_model("qwen2", vocab_size=120, max_position_embeddings=128).save_pretrained(tmp_path / "base")
    tiny_tokenizer().backend_tokenizer.model.save(str(tmp_path / "base"))  # vocab.json and merges.txt, nothing else
    session = open_session(str(tmp_path / "base"), None, LoadOptions(device="cpu"))
    kind = type(session.base.tokenizer).__name__
    assert kind == "Qwen2Tokenizer"
    adapter = find_adapter(str(make_adapter(session, tmp_path / "adapter")))
    found = merge(Request(None, adapter, LoadOptions(device="cpu")), tmp_path / "out")
    assert found["architecture"] == "LlamaForCausalLM"
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == kind


def test_a_full_disk_leaves_nothing(model_dir: Path, adapter_dir: Path, tmp_path: Path) -> None:
    """A limit on the size of a file stands for it: exit code 1, two lines, no folder."""
    call = [sys.executable, "-m", "braces_cli", "merge", "--adapter", adapter_dir, "--output-dir", tmp_path / "out"]
    done = subprocess.run(
        list(map(str, call)),
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)),
    )
    assert done.returncode == 1, done.stderr
    assert "cannot write" in done.stderr
    assert "Traceback" not in done.stderr
    assert names(tmp_path) == ["adapter"]


def test_a_dry_run_plans_without_weights(braces: Any, model_dir: Path, adapter_dir: Path) -> None:
    """Architecture and new neurons; of what cannot be merged the reason."""
    done = braces("merge", "--adapter", adapter_dir, "--output-dir", "out", "--dry-run", "--format", "json")
    assert done.code == 0
    assert done.json["architecture"] == "LlamaForCausalLM"
    assert done.json["neurons_added"] == 12
    assert done.json["settings"]["pad_to_multiple_of"] == 64


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rounding_and_effect_are_measured(request_: Request, dtype: str) -> None:
    """A faint adapter that is missing shows even where it changes less than rounding; no hook is left behind."""
    session = open_session(request_.model, request_.adapter, LoadOptions(device="cpu", dtype=dtype))
    assert session.adapter is not None
    for _, adapter_layer in session.adapter.adapted_ffns:
        adapter_layer.gate.data.sub_(0 if dtype == "float32" else 7)
    found = reference(session)
    assert (found.rounding < found.effect / 100) == (dtype == "float32")
    assert found.missing(found.logits) == 0
    with session.adapter.disabled(), torch.no_grad():
        bare = session.base.model(torch.tensor(found.ids)).logits.float()
    assert found.missing(bare) > 0.9
    assert not any(layer._forward_hooks for layer in session.base.model.model.layers)
