"""What is read of a base's own JSON files before transformers reads them: enough to name the key that is wrong.

Models differ, so only keys that mean the same in all of them are here, and none is needed. What else is wrong with a
file is told by the library that stumbles over it (`hub_errors.explained`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Required, TypedDict

import msgspec

from braces_cli.core.utils.documents import Count, Kind, Size, check_file, read
from braces_cli.core.utils.errors import ModelError
from braces_cli.core.utils.paths import is_there

# Layers are made one by one, which would take hours before it came to the end of the memory.
Layers = Annotated[int, msgspec.Meta(ge=0, le=10_000)]
TokenId = Annotated[int, msgspec.Meta(ge=0, lt=2**32)]


class ModelConfig(TypedDict, total=False):
    """`config.json`."""

    model_type: str
    architectures: list[str] | None
    auto_map: dict[str, Any] | None
    dtype: str | dict[str, Any] | None
    torch_dtype: str | dict[str, Any] | None
    quantization_config: dict[str, Any] | None
    text_config: ModelConfig | None
    id2label: dict[str, Any] | None
    hidden_size: Size | None
    is_encoder_decoder: bool | None
    num_hidden_layers: Layers | None
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


class AddedToken(TypedDict, total=False):
    """A token that stands for itself, whatever the model of the tokenizer says."""

    id: TokenId
    content: str
    special: bool
    normalized: bool
    lstrip: bool
    rstrip: bool
    single_word: bool


class VocabularyModel(TypedDict, total=False):
    """Pieces of words: ids by piece, or for `Unigram` a list of pieces with scores; `BPE` has merges."""

    type: str
    vocab: dict[str, TokenId] | list[tuple[str, float]]
    merges: list[str | tuple[str, str]]
    unk_token: str | None
    unk_id: TokenId | None


class VocabularyFile(TypedDict, total=False):
    """`tokenizer.json`; the parts that are of many types are told by the library."""

    added_tokens: list[AddedToken]
    model: Required[VocabularyModel]
    normalizer: dict[str, Any] | None
    pre_tokenizer: dict[str, Any] | None
    post_processor: dict[str, Any] | None
    decoder: dict[str, Any] | None


_HINT = "Check that this is a causal language model and that its download is complete."
_KINDS: dict[str, Kind[Any]] = {
    "config.json": Kind(ModelConfig, ModelError, _HINT, foreign=True),
    "generation_config.json": Kind(GenerationFile, ModelError, _HINT, foreign=True),
    "tokenizer_config.json": Kind(TokenizerFile, ModelError, _HINT, foreign=True),
}
_VOCABULARY = Kind(VocabularyFile, ModelError, _HINT, foreign=True)


def check_model_files(folder: Path) -> None:
    """Check the JSON files of a model folder, those that are there.

    Raises:
        ModelError: one is damaged; names file and key.
    """
    for name, kind in _KINDS.items():
        if is_there(folder / name):
            read(kind, folder / name)
    if is_there(folder / "tokenizer.json"):
        check_file(_VOCABULARY, folder / "tokenizer.json")
