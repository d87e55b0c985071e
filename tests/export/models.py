"""Tiny models and what the tests of exports compare."""

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig

from braces_cli.core.adapter.model import Adapter, attach
from tests.conftest import GATED, open_gates, tiny_model
from tests.core.architectures import tiny

TOKENS = torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(0))
SHIFT = torch.tensor([1.0, -2.0, 0.5, 3.0])


def phi3(**overrides: Any) -> Any:
    """A tiny Phi-3: gate and up are one projection, and so are q, k and v."""
    settings = {**GATED, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 1, **overrides}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(transformers.Phi3Config(**settings))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4) if parameter.ndim > 1 else parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


MODELS: dict[str, Any] = {
    "llama": lambda: tiny_model("llama"),
    "qwen2": lambda: tiny_model("qwen2", tie_word_embeddings=True),
    "mistral": lambda: tiny_model("mistral", sliding_window=None),
    "phi3": phi3,
    "gpt2": lambda: tiny_model("gpt2", n_positions=128),
    "gpt_neox": lambda: tiny_model("gpt_neox"),
    "opt": lambda: tiny_model("opt"),
    "phi": lambda: tiny_model("phi"),
    "modernbert-decoder": lambda: tiny("modernbert-decoder"),
    "qwen3": lambda: tiny_model("qwen3"),
    "mistral with a window": lambda: tiny_model("mistral", sliding_window=8),
    "phi3 with a window": lambda: phi3(sliding_window=8),
    **{name: lambda name=name: tiny(name) for name in ("gemma3_text", "qwen3_moe", "gpt_oss", "llama4_text", "bloom")},
}


def frozen(adapter: Adapter, shift: torch.Tensor | None) -> Adapter:
    """Fix the factors of the adapter, and set the steering `shift` (d_r,) of every layer."""
    for _, adapter_layer in adapter.adapted_ffns:
        adapter_layer.requires_grad_(False)
        adapter_layer.shift = shift
    return adapter


def with_adapter(
    model: Any,
    shift: torch.Tensor | None = None,
    layers: list[int] | None = None,
    seed: int = 1,
    relevance_to: str = "input",
) -> Adapter:
    """Attach an adapter of rank 4 with gates far from 0."""
    adapter = attach(model, 4, layers, seed=seed, relevance_to=relevance_to)
    open_gates(adapter, seed)
    return frozen(adapter, shift)


def logits(model: Any, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits.float()


def greedy(model: Any, tokens: torch.Tensor = TOKENS[:, :4]) -> torch.Tensor:
    config = GenerationConfig(max_new_tokens=48, do_sample=False, eos_token_id=None, pad_token_id=1)
    with torch.no_grad():
        return model.generate(input_ids=tokens, generation_config=config)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())
