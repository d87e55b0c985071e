"""The tokenizer: SentencePiece BPE with byte fallback, and the equal `tokenizer.json`.

`tokenizer.model` is for programs that only read SentencePiece, such as llama.cpp's converter.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

UNKNOWN, START, END = "<unk>", "<s>", "</s>"


def train_tokenizer(texts: Iterable[str], size: int, folder: Path) -> Tokenizer:
    """Fit the tokens to `texts` and write `tokenizer.model`, `tokenizer.json` and `tokenizer_config.json`."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=size,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=2,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    tokenizer = as_tokenizer(pieces)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": START,
        "eos_token": END,
        "unk_token": UNKNOWN,
        "pad_token": END,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return tokenizer


def as_tokenizer(pieces: Any) -> Tokenizer:
    """Return the merges of SentencePiece in its order: the piece with the highest score first."""
    vocabulary = {pieces.id_to_piece(i): i for i in range(pieces.get_piece_size())}
    merges: list[tuple[int, int, int, str, str]] = []
    for piece, number in vocabulary.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            plain = not any(pieces.is_byte(i) or pieces.is_control(i) for i in (number,))
            if plain and left in vocabulary and right in vocabulary:
                merges.append((number, vocabulary[left], vocabulary[right], left, right))
    tokenizer = Tokenizer(
        models.BPE(
            vocabulary,
            [(left, right) for _, _, _, left, right in sorted(merges)],
            unk_token=UNKNOWN,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="never", split=True)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([UNKNOWN, START, END])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A", pair=f"{START} $A {START} $B", special_tokens=[(START, vocabulary[START])]
    )
    return tokenizer
