"""Good files of every kind, made once by the commands themselves; a case copies what it breaks."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from sandbox import Case, run

_ROWS = [
    {"text": f"the {noun} is {word} and the day is {other}", "label": label, "attribute": label, "strength": strength}
    for noun in ("film", "town", "end", "show")
    for word, other, label, strength in (
        ("good", "happy", "positive", 1.0), ("sad", "bad", "negative", -1.0), ("old", "long", "neutral", 0.0),
    )
]  # fmt: skip
_SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 52, "vocab_size": 96, "max_position_embeddings": 128,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
}  # fmt: skip


class Good:
    """The good files in one folder, by attribute: a model, rows, adapters, attribute files and what commands wrote."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = folder / "model"
        self.rows = folder / "rows.jsonl"
        self.prompts = folder / "prompts.txt"
        self.adapter = folder / "adapter"
        self.conditioned = folder / "conditioned"
        self.signed = folder / "signed"
        self.attributes = folder / "attributes"
        self.run = folder / "run"
        self.merged = folder / "merged"
        self.evaluated = folder / "evaluated"
        self.texts = folder / "texts.jsonl"
        self.scorer = folder / "scorer"
        self.classifier = folder / "classifier"
        self.map = folder / "map.parquet"

    def make(self) -> None:
        """Make them all, each by the command that writes it; those that the same code has made already are kept.

        Raises:
            SystemExit: a command failed on good input.
        """
        made_by = self.folder / "code.sha256"
        if made_by.is_file() and made_by.read_text() == _code():
            return
        if self.folder.exists():
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True)
        _write_model(self.model)
        _write_classifier(self.classifier, self.model)
        self.rows.write_text("".join(json.dumps(row) + "\n" for row in _ROWS))
        self.prompts.write_text("the film is\na happy day\n")
        base = ("--model", str(self.model), "--device", "cpu")
        train = ("train", *base, "--data", str(self.rows), "--max-steps", "4", "--rank", "4", "--save-steps", "2")
        of_rows = ("--task-data", f"perplexity={self.rows}")
        steer = ("steer", *base, "--prompts", str(self.prompts), "--max-new-tokens", "4")
        calls: list[tuple[str, ...]] = [
            (*train, "--output-dir", "run"),
            (*train, "--output-dir", "conditioned", "--attribute-field", "attribute", "--save-steps", "0"),
            (*train, "--output-dir", "signed", "--relevance", "signed", "--save-steps", "0"),
            ("attr-build", *base, "--attribute", "bright", "--words", "good,happy,day", "--output-dir", "attributes"),
            ("attr-build", *base, "--attribute", "dark", "--examples", str(self.rows), "--output-dir", "attributes"),
            ("eval", *base, "--tasks", "perplexity", *of_rows, "--adapter", "run", "--output-dir", "evaluated"),
            ("merge", "--adapter", "run", "--output-dir", "merged", "--device", "cpu"),
            (*steer, "--output", "texts.jsonl", "--attribute", "positive"),
            (*steer, "--attribute", "positive", "--sweep", "0:1:1", "--scorer", f"fit:{self.rows}", "--save-scorer",
             "scorer"),
            ("inspect", "values", *base, "--output", "map.parquet"),
        ]  # fmt: skip
        for args in calls:
            outcome = run(Case(args, frozenset({0}), "good input", outputs=(".",)), self.folder, 600.0)
            if outcome.code != 0:
                raise SystemExit(f"good input failed: {' '.join(args)}\n{outcome.err}")
        shutil.copytree(self.run, self.adapter, ignore=shutil.ignore_patterns("checkpoint-*", "run.json", "*.jsonl"))
        made_by.write_text(_code())


def _code() -> str:
    """Hash of the package that is run and of this file."""
    import braces_cli

    digest = hashlib.sha256(Path(__file__).read_bytes())
    for path in sorted(Path(braces_cli.__path__[0]).rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _write_model(folder: Path) -> None:
    import torch
    import transformers

    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**_SIZES))
    model.save_pretrained(folder)
    _tokenizer().save_pretrained(folder)


def _write_classifier(folder: Path, model: Path) -> None:
    import torch
    import transformers

    torch.manual_seed(1)
    labels = {"id2label": {0: "negative", 1: "positive"}, "label2id": {"negative": 0, "positive": 1}}
    config = transformers.LlamaConfig(**_SIZES, **labels)
    transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    _tokenizer().save_pretrained(folder)


def _tokenizer() -> Any:
    """A byte-level BPE of 96 tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    letters = " abcdefghijklmnopqrstuvwxyz.,?!:'\"ABCDEQ0123456789\n"
    trainer = trainers.BpeTrainer(
        vocab_size=_SIZES["vocab_size"],
        special_tokens=["<s>", "</s>", "<unk>"],
        initial_alphabet=[pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(c)[0][0] for c in letters],
        show_progress=False,
    )
    tokenizer.train_from_iterator([row["text"] for row in _ROWS], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )
