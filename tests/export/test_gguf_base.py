"""Exports of a GGUF file: alone as a checkpoint, and with an adapter."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import tiny_tokenizer
from tests.core.gguf_files import tiny_llama, write_gguf
from tests.export.models import logits


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A GGUF file with a chat template."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}|{% endfor %}"
    change = lambda writer: writer.add_eot_token_id(5)  # noqa: E731
    return write_gguf(tmp_path / "tiny.gguf", tokenizer=tokenizer, change=change)


def test_a_file_becomes_a_checkpoint(braces: Any, file: Path, tmp_path: Path, in_process: None) -> None:
    """Equal logits, tokens and template in plain transformers; the verification can be repeated."""
    out = tmp_path / "out"
    call = ("merge", "--model", file, "--output-dir", out, "--device", "cpu", "--format", "json")
    plan = braces(*call, "--dry-run")
    assert (plan.json["architecture"], plan.json["trainable_parameters"]) == ("LlamaForCausalLM", 0)
    done = braces(*call)
    assert done.code == 0, done.err
    assert (done.json["dtype"], done.json["neurons_added"], done.json["max_logit_difference"]) == ("float32", 0, 0)
    assert (out / "model.safetensors").stat().st_mode == (out / "config.json").stat().st_mode
    model = AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(logits(model), logits(tiny_llama()))
    assert model.generation_config.eos_token_id == [1, 5]
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "a|"
    config = (out / "config.json").read_text()
    assert '"rope_theta"' in config
    assert str(tmp_path) not in config
    assert "adapter" not in (out / "README.md").read_text()
    again = braces("merge", "--check", out)
    assert again.code == 0, again.err


def test_other_models_need_an_adapter(braces: Any, file: Path, model_dir: Path, tmp_path: Path) -> None:
    """So do attributes."""
    for options in (("--model", model_dir), ("--model", file, "--attribute", "positive")):
        done = braces("merge", *options, "--output-dir", tmp_path / "out")
        assert done.code == 2
        assert "--adapter" in done.err


@pytest.mark.parametrize(
    ("kind", "relevance"), [("merge", "input"), ("merge", "output"), ("code", "input"), ("lora", "output")]
)
def test_an_adapter_of_the_file_is_exported(kind, relevance, braces, train, file, tmp_path, in_process):
    """Trained on the file; the adapter names it."""
    assert train(tmp_path / "adapter", "--max-steps", 1, "--relevance-to", relevance, base=file).code == 0
    command = ["merge"] if kind == "merge" else ["export", kind]
    done = braces(*command, "--adapter", tmp_path / "adapter", "--output-dir", tmp_path / "out", "--format", "json")
    assert done.code == 0, done.err
    assert done.json["model"] == str(file)
    assert not [path for path in (tmp_path / "out").iterdir() if path.is_dir()]
