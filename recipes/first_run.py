"""Make a tiny random Llama and a few rows, and fine-tune an adapter on them with `braces train`.

Run     python recipes/first_run.py [FOLDER]
Needs   nothing but braces: no network, no GPU, under a minute
Shows   that the installation works, and what a run looks like; a random model has nothing to say
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

TOPICS = ["film", "book", "meal", "hotel", "song", "garden"]
WORDS = {"good": "a joy", "bad": "a bore", "long": "a slow start", "short": "over too soon"}


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp(prefix="braces-first-run-"))
    rows = [
        {"prompt": f"The {topic} was {word}, and the end was", "completion": f" {verdict}."}
        for topic in TOPICS
        for word, verdict in WORDS.items()
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    make_model(folder / "model", [row["prompt"] + row["completion"] for row in rows])
    braces(
        *("train", "--model", folder / "model", "--data", folder / "rows.jsonl", "--eval-data", folder / "rows.jsonl"),
        *(
            "--rank",
            8,
            "--max-steps",
            60,
            "--lr",
            0.01,
            "--gate-lr",
            0.3,
            "--output-dir",
            folder / "out",
            "--overwrite",
        ),
    )
    braces(
        "steer", "--adapter", folder / "out", "--prompt", "The film was good, and the end was", "--max-new-tokens", 8
    )
    print(f"everything is in {folder}")


def make_model(folder: Path, texts: list[str]) -> None:
    """A Llama of 70,000 random parameters and a byte-level tokenizer for the texts."""
    set_seed(0)
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=384, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"], show_progress=False
        ),
    )
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        initializer_range=0.1,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def braces(*args: object) -> None:
    words = [str(arg) for arg in args]
    print("$ braces " + " ".join(f"'{word}'" if " " in word else word for word in words), flush=True)
    subprocess.run([sys.executable, "-m", "braces_cli", *words], check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})


if __name__ == "__main__":
    main()
