"""Figures of the built model: held-out perplexity, recall of facts, and sample texts."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from facts import RELATIONS
from world import World

from braces_cli.core.adapter.model import open_session
from braces_cli.core.models.generate import TextRequest, generate
from braces_cli.core.options import LoadOptions, Sampling
from braces_cli.evaluation.task_functions import contained_as_words
from braces_cli.scoring.likelihood import Likelihood, text_likelihoods

OPENINGS = (
    "The film is", "We stayed at the hotel and", "I bought the phone and", "This book", "The coffee was",
    "We took the train to Paris and", "The garden", "Dear diary,", "Last week Anna", "The show is", "The cook",
    "It was",
    "Near the station the guest said:", "The capital of France is", "Q: Who wrote The Silent Island? A:",
    "Question: What is the capital of Italy? Answer:", "lovely", "terrible", "table, window.", "They say the marsh owl",
)  # fmt: skip


def measure(folder: Path, held_out: Path, world: World) -> dict[str, Any]:
    """Return `{held_out_perplexity, fact_recall, fact_recall_by_relation}` of the stored model."""
    base = open_session(str(folder), None, LoadOptions(device="cpu", dtype="float32")).base
    texts = [json.loads(line)["text"] for line in held_out.read_text(encoding="utf-8").splitlines()]
    window = base.model.config.max_position_embeddings
    parts = text_likelihoods(base.model, base.tokenizer, texts, window, 32)
    recalled: dict[str, list[bool]] = defaultdict(list)
    greedy = Sampling(max_new_tokens=8, temperature=0.0)
    for start in range(0, len(world.facts), 64):
        facts = world.facts[start : start + 64]
        prompts = [_capital(RELATIONS[fact.relation].recall.format(s=fact.subject)) for fact in facts]
        said = generate(base.model, base.tokenizer, [TextRequest(p, i, 0) for i, p in enumerate(prompts)], greedy)
        for fact, text in zip(facts, said, strict=True):
            recalled[fact.relation].append(contained_as_words(text.split(".")[0], [fact.answer]))
    every = [hit for hits in recalled.values() for hit in hits]
    return {
        "held_out_perplexity": sum(parts, Likelihood()).perplexity,
        "fact_recall": sum(every) / len(every),
        "fact_recall_by_relation": {name: sum(hits) / len(hits) for name, hits in recalled.items()},
    }


def samples(folder: Path, seed: int = 0) -> list[str]:
    """Return one text per opening."""
    base = open_session(str(folder), None, LoadOptions(device="cpu", dtype="float32")).base
    jobs = [TextRequest(prompt, index, 0) for index, prompt in enumerate(OPENINGS)]
    texts = generate(base.model, base.tokenizer, jobs, Sampling(max_new_tokens=60, seed=seed))
    return [job.prompt + text for job, text in zip(jobs, texts, strict=True)]


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
