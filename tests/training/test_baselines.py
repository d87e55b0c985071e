"""PEFT baselines: parameter counts, training, and a folder that peft loads."""

from __future__ import annotations

import json
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file

import braces_cli
from braces_cli.core.adapter.model import open_session
from braces_cli.core.errors import ConfigError
from braces_cli.core.models.ffn import chosen_layers, find_ffns
from braces_cli.core.options import LoadOptions
from braces_cli.data.dataset import Reading, read_examples
from braces_cli.scoring.likelihood import Likelihood, likelihoods
from braces_cli.training.run import count_parameters
from braces_cli.training.settings import BASELINES, TrainSettings
from tests.conftest import tiny_model, write_rows
from tests.core.models.test_ffn import LLAMA2, LLAMA3, QWEN


@pytest.mark.parametrize(
    ("kind", "sizes", "expected"),
    [("Qwen2Config", QWEN, 2_179_072), ("LlamaConfig", LLAMA2, 8_388_608), ("LlamaConfig", LLAMA3, 6_815_744)],
)
def test_parameter_counts_of_lora_without_weights(kind, sizes, expected):
    """r = 16 on q_proj and v_proj of Qwen2.5-1.5B, Llama-2-7B and Llama-3-8B; the model is unchanged."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**sizes))
    names = [name for name, _ in model.named_parameters()]
    counts = count_parameters(model, find_ffns(model), TrainSettings(rank=16, method="lora"))
    assert counts["trainable_parameters"] == expected
    assert counts["total_parameters"] == sum(p.numel() for p in model.parameters())
    assert [name for name, _ in model.named_parameters()] == names
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("llama", {}, 2 * 4 * (32 + 32 + 32 + 16)),  # q_proj 32 -> 32, v_proj 32 -> 16
        ("gpt2", {}, 2 * 4 * (32 + 96)),  # c_attn, stored transposed
        ("gpt_neox", {}, 2 * 4 * (32 + 96)),  # query_key_value
        ("phi", {}, 2 * 4 * (32 + 32) * 2),  # q and v alone, where peft would take the FFN, too
        ("llama", {"layers": "1"}, 4 * (32 + 32 + 32 + 16)),
        ("llama", {"lora_targets": ("up_proj",)}, 2 * 4 * (32 + 52)),
        ("llama", {"method": "dora"}, 2 * (4 * (32 + 32 + 32 + 16) + 32 + 16)),
    ],
)
def test_adapted_modules(name, changes, expected):
    """Queries and values under any name; other modules and layers on request."""
    settings = TrainSettings(**{"rank": 4, "method": "lora", **changes})
    model = tiny_model(name)
    counts = count_parameters(model, find_ffns(model), settings, chosen_layers(model, settings.layers))
    assert counts["trainable_parameters"] == expected


@pytest.mark.parametrize("targets", [("nowhere",), ()])
def test_missing_targets(targets):
    """Named and missing, or for an architecture without a default in peft."""
    config = transformers.PersimmonConfig(
        hidden_size=32, intermediate_size=52, num_hidden_layers=2, num_attention_heads=4, vocab_size=96
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(ConfigError) as caught:
        count_parameters(model, find_ffns(model), TrainSettings(method="lora", lora_targets=targets))
    assert caught.value.where == "--lora-targets"
    assert "query_key_value" in str(caught.value)


@pytest.fixture(scope="module")
def trained(model_dir, tmp_path_factory):
    """Rows, settings and the result of an adapter that the baselines are compared with."""
    folder = tmp_path_factory.mktemp("braces")
    words = ["good", "sad", "old", "happy and old"]
    rows = write_rows(folder / "rows.jsonl", ({"text": f"the {a} film and the {b} end"} for a in words for b in words))
    settings = {"model": model_dir, "eval_data": rows, "rank": 4, "max_steps": 5, "warmup_steps": 0, "lr": 0.02}
    settings |= {"batch_size": 4, "device": "cpu"}
    return rows, settings, braces_cli.train(rows, folder / "out", **settings)


@pytest.mark.parametrize("method", BASELINES)
def test_baseline_trains_on_the_same_tokens_and_peft_loads_it(trained, model_dir, tmp_path, method):
    """Same keys and tokens; peft reproduces the evaluation loss on an untouched base."""
    from peft import PeftModel

    rows, settings, ours = trained
    theirs = braces_cli.train(rows, tmp_path / method, method=method, **settings)
    assert set(ours) == set(theirs)
    assert (theirs["method"], theirs["steps"]) == (method, 5)
    assert theirs["tokens"] == ours["tokens"]
    assert theirs["base_eval_loss"] == ours["base_eval_loss"]
    assert theirs["eval_loss"] < theirs["base_eval_loss"]
    files = {path.name for path in (tmp_path / method).iterdir()}
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors"} <= files
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in files)
    adapted = {name.split(".")[-3] for name in load_file(tmp_path / method / "adapter_model.safetensors")}
    assert {"q_proj", "v_proj"} <= adapted <= {"q_proj", "v_proj", "self_attn"}
    config = json.loads((tmp_path / method / "adapter_config.json").read_text())
    # PiSSA as the difference to its start: a LoRA of twice the rank for an unchanged base.
    assert (config["r"], config["init_lora_weights"]) == (8 if method == "pissa" else 4, True)
    # A set in peft, whose order differs between processes.
    assert config["target_modules"] == sorted(config["target_modules"])
    assert "PeftModel.from_pretrained" in (tmp_path / method / "README.md").read_text()

    session = open_session(str(model_dir), None, LoadOptions(device="cpu"))
    tokenizer = session.base.tokenizer
    wrapped = PeftModel.from_pretrained(session.base.model, tmp_path / method).eval()
    assert wrapped.peft_config["default"].base_model_name_or_path == str(model_dir)
    examples = read_examples([str(rows)], Reading(tokenizer, 128)).items
    again = sum(likelihoods(wrapped, examples, tokenizer.pad_token_id, 16), Likelihood())
    assert again.loss == pytest.approx(theirs["eval_loss"], rel=1e-5)


def test_missing_peft(train, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    outcome = train(tmp_path / "o", "--method", "lora")
    assert outcome.code == 2
    assert "pip install peft" in outcome.err
    assert not (tmp_path / "o").exists()
