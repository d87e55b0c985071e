"""What is read of a base's own JSON files before transformers reads them: enough to name the key that is wrong.

Models differ, so only keys that mean the same in all of them are here, and none is needed. What else is wrong with a
file is told by the library that stumbles over it (`hub_errors.explained`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypedDict

from braces_cli.core.utils.documents import Count, Kind, Size, read
from braces_cli.core.utils.errors import ModelError


class ModelConfig(TypedDict, total=False):
    """`config.json`."""

    model_type: str
    architectures: list[str] | None
    auto_map: dict[str, Any] | None
    dtype: str | dict[str, Any] | None
    torch_dtype: str | dict[str, Any] | None
    quantization_config: dict[str, Any] | None
    text_config: dict[str, Any] | None
    id2label: dict[str, Any] | None
    hidden_size: Size | None
    num_hidden_layers: Count | None
    vocab_size: Size | None
    tie_word_embeddings: bool | None
    bos_token_id: int | list[int] | None
    eos_token_id: int | list[int] | None
    pad_token_id: int | list[int] | None


class GenerationFile(TypedDict, total=False):
    """`generation_config.json`: what generation takes over where the command does not say otherwise."""

    bos_token_id: int | list[int] | None
    eos_token_id: int | list[int] | None
    pad_token_id: int | list[int] | None
    do_sample: bool | None
    max_length: Count | None
    num_beams: Size | None
    repetition_penalty: float | None
    temperature: float | None
    top_k: int | None
    top_p: float | None


class TokenizerFile(TypedDict, total=False):
    """`tokenizer_config.json`."""

    added_tokens_decoder: dict[str, Any] | None
    auto_map: dict[str, Any] | list[Any] | None
    chat_template: str | list[dict[str, Any]] | dict[str, str] | None
    model_max_length: float | None
    tokenizer_class: str | None


_HINT = "Check that this is a causal language model and that its download is complete."
_KINDS: dict[str, Kind[Any]] = {
    "config.json": Kind(ModelConfig, ModelError, _HINT, foreign=True),
    "generation_config.json": Kind(GenerationFile, ModelError, _HINT, foreign=True),
    "tokenizer_config.json": Kind(TokenizerFile, ModelError, _HINT, foreign=True),
}


def check_model_files(folder: Path) -> None:
    """Check the JSON files of a model folder, those that are there.

    Raises:
        ModelError: one is damaged; names file and key.
    """
    for name, kind in _KINDS.items():
        if (folder / name).exists():
            read(kind, folder / name)
