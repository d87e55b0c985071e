"""PEFT baselines: parameter counts, training, and a folder that peft loads."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file

import braces_cli
from braces_cli.core.adapter.files import AdapterConfig
from braces_cli.core.adapter.model import open_session
from braces_cli.core.errors import ConfigError
from braces_cli.core.models.ffn import chosen_layers, find_ffns
from braces_cli.core.options import LoadOptions
from braces_cli.data.dataset import Reading, read_examples
from braces_cli.scoring.likelihood import Likelihood, likelihoods
from braces_cli.training import checkpoint
from braces_cli.training.baselines import PeftAdapter, baseline_parameters
from braces_cli.training.run import count_parameters
from braces_cli.training.settings import BASELINES, TrainSettings
from tests.conftest import tiny_model, write_rows


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
    rows, settings, ours = trained
    theirs = braces_cli.train(rows, tmp_path / method, method=method, **settings)
    compare(ours, theirs, tmp_path / method, settings)
    assert theirs["method"] == method
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
    assert config["base_model_name_or_path"] == str(model_dir)


def compare(ours: dict, theirs: dict, folder: Path, settings: dict) -> None:
    """Same keys, steps and tokens as `ours`, and a loss that peft reproduces with `folder` on the plain base."""
    assert set(ours) == set(theirs)
    for name in ("steps", "tokens", "base_eval_loss"):
        assert theirs[name] == ours[name]
    assert theirs["eval_loss"] < theirs["base_eval_loss"]
    session = open_session(str(settings["model"]), None, LoadOptions(device="cpu"))
    tokenizer = session.base.tokenizer
    wrapped = PeftModel.from_pretrained(session.base.model, folder).eval()
    examples = read_examples([str(settings["eval_data"])], Reading(tokenizer, 128, window=128)).items
    found = sum(likelihoods(wrapped, examples, tokenizer.pad_token_id, 16), Likelihood())
    assert found.loss == pytest.approx(theirs["eval_loss"], rel=1e-5)


def test_a_config_of_peft_is_a_method(trained, model_dir, tmp_path):
    """The rank of the settings is not read, so the parameters are those of the file, which is part of the run."""
    rows, settings, ours = trained
    file = tmp_path / "ia3.json"
    file.write_text('{"peft_type": "IA3"}')
    options = {name: value for name, value in settings.items() if name != "rank"}
    options |= {"method": f"peft:{file}", "lr": 0.1}
    compare(ours, braces_cli.train(rows, tmp_path / "ia3", **options), tmp_path / "ia3", settings)
    card = (tmp_path / "ia3" / "README.md").read_text()
    assert "# ia3 adapter\n" in card
    assert "peft:ia3.json" in card
    assert str(tmp_path) not in card.replace(str(model_dir), "")
    file.write_text('{"peft_type": "IA3", "target_modules": ["v_proj"], "feedforward_modules": []}')
    with pytest.raises(ConfigError, match=r"other settings: --peft-config"):
        braces_cli.train(rows, tmp_path / "ia3", resume=True, **options)


# Keys that a type needs on the tiny model.
_KEYS: dict[str, dict[str, Any]] = {
    "C3A": {"block_size": 4}, "FOURIERFT": {"n_frequency": 50}, "MISS": {"r": 4}, "PSOFT": {"r": 4},
    "ROAD": {"group_size": 4}, "TRAINABLE_TOKENS": {"token_indices": [3, 5]},
    "VBLORA": {"vector_length": 4, "num_vectors": 16}, "WAVEFT": {"n_frequency": 50},
}  # fmt: skip
_REFUSED = {
    "ADALORA", "ADAMSS", "ADAPTION_PROMPT", "CARTRIDGE", "CPT", "FROD", "MULTITASK_PROMPT_TUNING", "POLY",
    "PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING", "SHADOW", "SHIRA", "XLORA",
}  # fmt: skip
_VARIANTS = [
    {"init_lora_weights": "olora"},
    {"init_lora_weights": "pissa_niter_4", "use_rslora": True},
    {"use_dora": True, "bias": "lora_only", "modules_to_save": ["lm_head"], "trainable_token_indices": [3, 5]},
]


@pytest.mark.parametrize(
    "options",
    [*({"peft_type": kind.value, **_KEYS.get(kind.value, {})} for kind in PEFT_TYPE_TO_CONFIG_MAPPING),
     *({"peft_type": "LORA", **variant} for variant in _VARIANTS)],
    ids=lambda options: "-".join(map(str, options.values())),
)  # fmt: skip
def test_every_type_of_peft_has_the_same_logits_on_the_plain_base_or_is_refused(options, tmp_path):
    """Parameters are counted without weights, every one is trained, and a checkpoint has every one."""
    file, folder, model = tmp_path / "config.json", tmp_path / "out", tiny_model()
    file.write_text(json.dumps(options))
    if options["peft_type"] in _REFUSED:
        with pytest.raises(ConfigError, match="`peft_type`") as error:
            count_parameters(model, find_ffns(model), TrainSettings(method=f"peft:{file}"))
        assert error.value.where == str(file)
        return
    settings = TrainSettings(method=f"peft:{file}")
    base, ids = copy.deepcopy(model), torch.arange(2, 16).view(2, 7)
    counted = baseline_parameters(copy.deepcopy(model).to("meta"), settings, None)
    adapter = PeftAdapter(model, settings, None)
    parameters = [p for _, p in adapter.named_parameters()]
    assert sum(p.numel() for p in parameters) == counted
    assert {id(p) for p in checkpoint.trained(model).values()} == {id(p) for p in parameters}
    optimizer = torch.optim.AdamW(parameters, lr=0.02)
    for _ in range(3):
        model.train()(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    assert all(p.grad is not None for p in parameters)
    with torch.no_grad():
        logits, plain = model.eval()(ids).logits, base(ids).logits
        folder.mkdir()
        adapter.save(folder, AdapterConfig("base", 1, [], {}), "")
        again = PeftModel.from_pretrained(base, folder).eval()(ids).logits
    assert (logits - plain).abs().max() > 1e-3
    torch.testing.assert_close(again, logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "broken JSON"),
        ("[]", "expected object"),
        ('{"r": 4}', "missing required field `?peft_type"),
        ('{"peft_type": "lora"}', "`peft_type`: peft has no `lora`\nDid you mean LORA"),
        ('{"peft_type": "LORA", "rank": 4}', "peft refuses .*unexpected keyword argument .rank"),
        ('{"peft_type": "LORA", "r": "4"}', "peft refuses .*not supported between"),
        ('{"peft_type": "LORA", "r": 0}', "peft refuses .*`r` should be a positive integer"),
        ('{"peft_type": "LORA", "target_modules": ["nowhere"]}', "nowhere.*\n.*q_proj"),
        ('{"peft_type": "LORA", "task_type": "SEQ_CLS"}', "`task_type`: the adapter is for SEQ_CLS"),
        ('{"peft_type": "LORA", "init_lora_weights": "eva"}', "`init_lora_weights`: eva needs a pass over data"),
        ('{"peft_type": "LORA", "init_lora_weights": "loftq"}', "`init_lora_weights`: loftq needs a pass over data"),
        ('{"peft_type": "LORA", "init_lora_weights": "pissa", "use_dora": true}', "`use_dora`: cannot be combined"),
        ('{"peft_type": "LORA", "alora_invocation_tokens": [1]}', "`alora_invocation_tokens`: rows do not"),
        ('{"peft_type": "LORA", "megatron_config": {}}', "`megatron_config`: peft imports a module"),
        ('{"peft_type": "IA3", "megatron_core": "os"}', "`megatron_core`: peft imports a module"),
        ('{"peft_type": "TRAINABLE_TOKENS"}', "trains no parameter"),
        ('{"peft_type": "PREFIX_TUNING"}', "`peft_type`: PREFIX_TUNING adds prompt tokens"),
        ('{"peft_type": "ADALORA", "total_step": 9}', "`peft_type`: ADALORA needs a call"),
    ],
)
def test_bad_configs_of_peft(content, message, train, tmp_path):
    """An error with the file, before rows and weights are read."""
    file = tmp_path / "bad.json"
    file.write_text(content)
    outcome = train(tmp_path / "out", "--method", f"peft:{file}", rank=None, data=tmp_path / "missing.jsonl")
    assert outcome.code == 2
    assert str(file) in outcome.err
    assert re.search(message, outcome.err)


def test_warnings_of_peft_are_shown_once(train, tmp_path):
    file = tmp_path / "config.json"
    file.write_text('{"peft_type": "LORA", "eva_config": {}}')
    outcome = train(tmp_path / "out", "--method", f"peft:{file}", "--max-steps", 1, rank=None)
    assert outcome.code == 0
    assert outcome.err.count("`eva_config` specified but will be ignored") == 1
