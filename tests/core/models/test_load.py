"""Load bases and tokenizers: commits, tokens that the model does not have, damaged files, quantisation."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from braces_cli.api import load
from braces_cli.core.adapter.model import attach
from braces_cli.core.errors import ConfigError, ModelError
from braces_cli.core.models import load as loading
from braces_cli.core.models.ffn import find_ffns
from braces_cli.core.models.generate import TextRequest, generate
from braces_cli.core.models.tokenize import encode
from braces_cli.core.models.weights import StoredValues
from braces_cli.core.options import LoadOptions, Sampling
from tests.conftest import make_adapter, open_gates, tiny_model, tiny_tokenizer
from tests.core.comparison import relative, run
from tests.core.models.test_weights import require


def test_a_hub_model_is_identified_by_its_commit(monkeypatch, model_dir, tmp_path):
    """A branch can change after training. A folder has no commit."""
    assert loading.commit_of(str(model_dir), None, loading.checkpoint_path(str(model_dir), None)) is None
    cached = tmp_path / "models--owner--name" / "snapshots" / "0123abc" / "config.json"
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *args, **kwargs: str(cached))
    folder = loading.checkpoint_path("owner/name", "main")
    assert loading.commit_of("owner/name", "main", folder) == "0123abc"


@pytest.fixture
def edited(model_dir: Path, tmp_path: Path) -> Callable[[Callable[[Any], object]], str]:
    """A copy of the base with another `tokenizer.json`; its name."""

    def copy(change: Callable[[Any], object]) -> str:
        shutil.copytree(model_dir, tmp_path / "base")
        path = tmp_path / "base" / "tokenizer.json"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
        return str(tmp_path / "base")

    return copy


def test_a_token_that_the_model_does_not_have_is_an_error_when_used(edited: Any, model_dir: Path) -> None:
    """As with the tokenizer of another model; other texts are accepted."""

    token = loading.load_tokenizer(str(model_dir)).tokenize("in the")[-1]
    name = edited(lambda content: content["model"]["vocab"].update({token: 100_000}))
    base = loading.load_base(name, LoadOptions(device="cpu"))

    def run(text: str) -> None:
        base.model(base.tokenizer(text, return_tensors="pt")["input_ids"])

    run("a dog")
    with pytest.raises(ModelError, match="has token 100000, and the model embeds") as caught:
        run("in the")
    assert caught.value.where == name


def test_a_padding_token_that_the_model_does_not_have_is_replaced(edited: Any, tmp_path: Path) -> None:
    """Some models were trained without padding."""
    name = edited(lambda content: content["model"]["vocab"].update({"[PAD]": 100_000}))
    config = tmp_path / "base" / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "pad_token": "[PAD]"}))
    assert loading.load_tokenizer(name).pad_token_id == 100_000
    base = loading.load_base(name, LoadOptions(device="cpu"))
    texts = generate(base.model, base.tokenizer, [TextRequest("a", 0), TextRequest("a dog in the", 1)], Sampling(4))
    assert len(texts) == 2


def test_a_panic_of_the_tokenizer_is_an_error(edited: Any) -> None:
    """pyo3 turns a panic into a class that is not an Exception."""
    template = {
        "type": "TemplateProcessing", "pair": [], "special_tokens": {},
        "single": [{"SpecialToken": {"id": "nowhere", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    }  # fmt: skip
    tokenizer = loading.load_tokenizer(edited(lambda content: content.update(post_processor=template)))
    with pytest.raises(ModelError, match="the tokenizer fails on `a dog`"):
        encode(tokenizer, "a dog")


@pytest.mark.parametrize("name", ["", "x", "auto:1", "spread"])
def test_an_unknown_device_map_is_refused(model_dir: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="is not a device") as caught:
        loading.load_base(str(model_dir), LoadOptions(device="cpu", device_map=name))
    assert caught.value.where == "--device-map"


def test_a_config_of_an_encoder_and_decoder_is_refused(model_dir: Path, tmp_path: Path) -> None:
    """It would load, and generate wrong text."""
    shutil.copytree(model_dir, tmp_path / "base")
    path = tmp_path / "base" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "is_encoder_decoder": True}))
    with pytest.raises(ModelError, match="is_encoder_decoder"):
        loading.load_base(str(tmp_path / "base"), LoadOptions(device="cpu"))


def test_an_adapter_next_to_a_model_is_not_loaded(model_dir: Path, tmp_path: Path, caplog: Any) -> None:
    """transformers would add it; the folder is a model in Python, too."""
    base = str(shutil.copytree(model_dir, tmp_path / "base"))
    config = peft.LoraConfig(target_modules=["down_proj"], init_lora_weights=False)
    peft.get_peft_model(loading.load_base(base, LoadOptions(device="cpu")).model, config).save_pretrained(base)
    found = [load(name, device="cpu").session.base.model for name in (base, model_dir)]
    assert dict(found[0].state_dict()).keys() == dict(found[1].state_dict()).keys()
    assert caplog.text.count("the adapter next to the model is not loaded") == 1


@pytest.mark.parametrize(
    ("config", "weights", "words"),
    [
        ({"vocab_size": 104}, None, r"checkpoint has .*weight \(96, 32\), and its config.json \(104, 32\)"),
        ({}, 999, "The file of the weights is damaged"),
        ({"_attn_implementation": "flash_attention_2"}, None, "--attn-implementation"),
    ],
)
def test_messages_of_a_base_that_cannot_be_loaded(
    model_dir: Path, tmp_path: Path, config: dict[str, Any], weights: int | None, words: str
) -> None:
    """Resized embeddings, a cut file, an implementation of attention that is not installed."""
    base = shutil.copytree(model_dir, tmp_path / "base")
    path = base / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    file = base / "model.safetensors"
    file.write_bytes(file.read_bytes()[:weights])
    with pytest.raises(ModelError) as caught:
        loading.load_base(str(base), LoadOptions(device="cpu"))
    assert re.search(words, str(caught.value))
    loading.load_shape(str(base))
    if "_attn_implementation" in config:
        loading.load_base(str(base), LoadOptions(device="cpu", attn_implementation="sdpa"))


def test_a_base_that_was_moved(braces: Any, session: Any, tmp_path: Path) -> None:
    """Exit code 4 with the adapter that names the base, and --model; a fitting base then opens."""
    moved = shutil.copytree(session.base.name, tmp_path / "moved")
    session.base.name = str(tmp_path / "base")
    adapter = make_adapter(session, tmp_path / "adapter")
    expected = f"Error: {adapter}: the base of this adapter does not exist: {tmp_path / 'base'}\nName the base with"
    for words in ("inspect", "steer --prompt a", "eval --tasks arc_easy", "merge --output-dir o"):
        outcome = braces(*words.split(), "--adapter", adapter)
        assert (outcome.code, outcome.err[: len(expected)]) == (4, expected)
    assert braces("inspect", "--adapter", adapter, "--model", moved).code == 0


@pytest.mark.parametrize(("name", "package"), [("int8", "torchao"), ("bnb-4bit", "bitsandbytes")])
def test_a_missing_package_is_named(monkeypatch, name, package):
    """Exit code 2, and what to install."""
    monkeypatch.setattr("braces_cli.core.models.load.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=rf"pip install {package}"):
        loading.check_quantize(name, torch.device("cpu"))


@pytest.mark.parametrize("name", ["bnb-8bit", "bnb-4bit"])
def test_a_bitsandbytes_without_this_device_is_refused(monkeypatch, name):
    """A release that supports CUDA only is refused before the weights are loaded."""
    require(name)
    import bitsandbytes

    monkeypatch.delattr(bitsandbytes, "supported_torch_devices")
    with pytest.raises(ConfigError, match="runs on cuda, not on cpu"):
        loading.check_quantize(name, torch.device("cpu"))
    loading.check_quantize(name, torch.device("cuda"))


def test_gpt2_is_packed_by_bitsandbytes_and_refused_by_torchao(tmp_path):
    """torchao skips layers that are not `nn.Linear` without an error."""
    tiny_model("gpt2").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    require("int8")
    with pytest.raises(ConfigError, match="packs nothing in GPT2LMHeadModel"):
        loading.load_base(str(tmp_path), LoadOptions(device="cpu", quantize="int8"))
    require("bnb-4bit")
    model = loading.load_base(str(tmp_path), LoadOptions(device="cpu", quantize="bnb-4bit")).model
    assert isinstance(find_ffns(model)[0].values(), StoredValues)
    adapter = attach(model, 4)
    open_gates(adapter)
    assert relative(run(model, adapter, False)[0], run(model, adapter, True)[0]) < 1e-5


def test_a_quantised_checkpoint_is_not_quantised_again(model_dir: Path, tmp_path: Path) -> None:
    """Exit code 2; without --quantize it loads unchanged."""
    require("int8")
    shutil.copytree(model_dir, tmp_path / "base")
    path = tmp_path / "base" / "config.json"
    quantised = {**json.loads(path.read_text()), "quantization_config": {"quant_method": "gptq", "bits": 4}}
    path.write_text(json.dumps(quantised))
    with pytest.raises(ConfigError, match=r"already quantised \(gptq\)"):
        loading.load_base(str(tmp_path / "base"), LoadOptions(device="cpu", quantize="int8"))
