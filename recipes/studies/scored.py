"""What it saves to compute logits of scored tokens only: passes with all logits and with those, in turns.

Run     python recipes/studies/scored.py --model M --data rows.jsonl
        python recipes/studies/scored.py --model M --qwen-head --data rows.jsonl
            reads the rows with M's tokenizer; the model has the widths, head and vocabulary of Qwen2.5-0.5B, random
            weights and two layers
Needs   rows with prompts; two cores and a few minutes
Shows   one JSON document: the share of tokens that are scored, tokens a second, the ratio of times with its spread.
        The longer the prompts, and the larger the vocabulary against the model, the more is saved.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from braces_cli.core.method.adapter import attach
from braces_cli.core.models.load_options import LoadOptions
from braces_cli.core.models.loading import load_tokenizer
from braces_cli.core.session import open_session
from braces_cli.data.examples import Reading, read_examples
from braces_cli.training.collator import Batch, Collator, Layout
from braces_cli.training.packing_probe import attention_cost
from braces_cli.training.sampler import EpochSampler
from braces_cli.training.selective_logits import mean_loss, only_scored

BATCH, RANK, MAX_LENGTH = 16, 16, 1024
QWEN = Qwen2Config(
    hidden_size=896,
    intermediate_size=4864,
    num_hidden_layers=2,
    num_attention_heads=14,
    num_key_value_heads=2,
    vocab_size=151_936,
    tie_word_embeddings=True,
)


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--model", required=True)
    options.add_argument("--data", action="append", required=True)
    options.add_argument("--qwen-head", action="store_true")
    options.add_argument("--batches", type=int, default=9)
    args = options.parse_args()
    torch.manual_seed(0)
    model = (
        Qwen2ForCausalLM(QWEN)
        if args.qwen_head
        else open_session(args.model, None, LoadOptions(device="cpu")).base.model
    )
    attach(model.train(), RANK)
    rows = read_examples(args.data, Reading(load_tokenizer(args.model), MAX_LENGTH))
    config = model.config
    packed = Layout(True, attention_cost(model, config.num_hidden_layers, config.hidden_size))
    collators = {"all": Collator(packed, 0), "scored": Collator(Layout(True, packed.attention, only_scored=True), 0)}
    order = list(EpochSampler(len(rows.items), 0, BATCH))
    times: dict[str, list[float]] = {name: [] for name in collators}
    tokens = scored = 0
    for index in range(args.batches + 1):
        chosen = [rows[row] if row >= 0 else None for row in order[index * BATCH : (index + 1) * BATCH]]
        for name, collator in collators.items():
            batch = collator(chosen)
            spent = passes(model, batch)
            if index:  # the first one warms up
                times[name].append(spent)
        if index:
            tokens += batch.tokens
            scored += batch.scored
    ratios = sorted(after / before for before, after in zip(times["all"], times["scored"], strict=True))
    found = {
        "scored_share": scored / tokens,
        "tokens_per_second": {name: tokens / sum(spent) for name, spent in times.items()},
        "time_ratio": {"median": statistics.median(ratios), "least": ratios[0], "most": ratios[-1]},
    }
    print(json.dumps(found, indent=2))


def passes(model: Any, batch: Batch) -> float:
    """Seconds that a batch takes forward and back."""
    started = time.perf_counter()
    total: Any = 0.0
    for block in batch.blocks:
        labels = block.pop("labels")
        with only_scored(model, block.pop("scored", None)):
            total = total + mean_loss(model(**block, use_cache=False).logits, labels, batch.scored)
    total.backward()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
