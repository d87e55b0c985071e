"""A tiny Llama with a byte tokenizer, saved as a folder, and adapters of it."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

# lm-eval draws progress bars; set before anything imports tqdm.
os.environ.setdefault("TQDM_DISABLE", "1")

import peft
import pytest
import torch

from tests.conftest import make_adapter as save_adapter


def evaluate(model: str | None, adapters: list[str], settings: Any, **more: Any) -> Any:
    """Result of an evaluation on the CPU."""
    from braces_cli.evaluation.run import run_evaluation

    return run_evaluation(replace(settings, model=model, adapter=tuple(adapters), device="cpu", **more))


def popqa_rows(count: int) -> list[dict[str, str]]:
    """Rows in the schema of PopQA."""
    return [{"question": f"What is {i}?", "possible_answers": json.dumps([chr(97 + i)])} for i in range(count)]


def results(rows: dict[str, Any], name: Any = None, **more: Any) -> dict[str, Any]:
    """A document of results with the scores of each system; `name` in the place of other names."""
    tables = ("num_fewshot_used", "task_versions", "task_data_sha256", "seeds", "versions")
    about = {**dict.fromkeys(("model", "adapter", "method"), name), "sha256": "0", "attributes": None}
    systems = [{"name": system, "results": scores, **about} for system, scores in rows.items()]
    settings: dict[str, Any] = {
        **dict.fromkeys(("revision", "dtype", "quantize", "limit", "apply_chat_template")),
        **{table: {name: "1"} for table in tables},
        "tokenizer": {"chat_template": None}, "significance_level": 0.05, "base_sha256": "0",
    }  # fmt: skip
    return {"systems": systems, "comparisons": [], "settings": settings, **more}


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random two-layer Llama; its tokenizer has bytes only and puts `<s>` first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<s>", "</s>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocab), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=2048, bos_token_id=0, eos_token_id=1, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def make_adapter(tmp_path_factory: pytest.TempPathFactory):
    """Save an adapter of a base folder that changes the scores."""

    def make(base_folder: Path, seed: int = 0) -> Path:
        from braces_cli.core.adapter.model import open_session
        from braces_cli.core.options import LoadOptions

        session = open_session(str(base_folder), None, LoadOptions(device="cpu"))
        return save_adapter(session, tmp_path_factory.mktemp("adapter") / f"seed{seed}", seed=seed)

    return make


@pytest.fixture
def write_jsonl(tmp_path: Path):
    def write(name: str, rows: list) -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def make_peft(tmp_path_factory: pytest.TempPathFactory):
    """Save a PEFT adapter of a base folder with random weights from a seed."""

    def make(base_folder: Path, config: object, seed: int = 0) -> Path:
        from braces_cli.core.models.load import load_base
        from braces_cli.core.options import LoadOptions

        torch.manual_seed(seed)
        wrapped = peft.get_peft_model(load_base(str(base_folder), LoadOptions(device="cpu")).model, config)
        with torch.no_grad():
            for parameter in wrapped.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.3)
        folder = tmp_path_factory.mktemp("peft") / f"lora{seed}"
        wrapped.save_pretrained(folder)
        return folder

    return make
