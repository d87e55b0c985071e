"""Small GGUF files of a Llama, as llama.cpp's converter writes them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from tests.conftest import tiny_model, tiny_tokenizer

Change = Callable[[gguf.GGUFWriter], object]


def tiny_llama(**settings: Any) -> Any:
    """A Llama whose rows fit the blocks of quantised files."""
    return tiny_model("llama", intermediate_size=64, max_position_embeddings=128, **settings)


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key projection in the order of llama.cpp."""
    return weight.reshape(heads, 2, len(weight) // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def write_tokenizer(writer: gguf.GGUFWriter, tokenizer: Any) -> None:
    """Add a byte-level tokenizer with its chat template."""
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_token_types([control if token in tokenizer.all_special_tokens else normal for token in tokens])
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_add_bos_token(True)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def write_gguf(
    path: Path,
    model: Any = None,
    *,
    quantised: bool = False,
    weights: bool = True,
    tokenizer: Any = None,
    change: Change | None = None,
    architecture: str = "llama",
) -> Path:
    """Write `model`, a Llama in float32.

    Args:
        quantised: write matrices as Q8_0.
        weights: False leaves them out.
        tokenizer: False leaves it out.
        change: adds more to the file.
        architecture: as which the file is declared.
    """
    model = tiny_llama() if model is None else model
    config, writer = model.config, gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if tokenizer is not False:
        write_tokenizer(writer, tokenizer or tiny_tokenizer())
    if change is not None:
        change(writer)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items() if weights else ():
        array = tensor.float().numpy()
        if ".q_proj." in name:
            array = interleaved(array, config.num_attention_heads)
        elif ".k_proj." in name:
            array = interleaved(array, config.num_key_value_heads)
        kind = gguf.GGMLQuantizationType.Q8_0 if quantised and array.ndim == 2 else gguf.GGMLQuantizationType.F32
        stored = gguf.quantize(np.ascontiguousarray(array), kind)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
