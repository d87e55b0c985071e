"""Train the model: windows of packed documents, matrix products in bfloat16, weights in float32.

Muon trains the matrices of the layers, AdamW embedding and norms; AdamW alone needed more tokens.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

WINDOW = 256


def windows(texts: Iterable[str], tokenizer: Tokenizer, count: int, seed: int) -> np.ndarray:
    """Return (count, WINDOW) tokens: concatenated documents, each between its start and end token.

    Half of the windows begin with a document, so that the model sees single words at the start, as in the pooling of
    attributes; the others begin inside a document.
    """
    rng = random.Random(seed)
    end = tokenizer.token_to_id("</s>")
    source = _encoded(iter(texts), tokenizer)
    out = np.empty((count, WINDOW), dtype=np.int16)
    for row in out:
        ids: list[int] = []
        while len(ids) < WINDOW:
            document = [*next(source), end]
            if not ids and rng.random() < 0.5:
                document = document[rng.randrange(1, len(document)) :]
            ids += document
        row[:] = ids[:WINDOW]
    return out


def _encoded(texts: Iterator[str], tokenizer: Tokenizer) -> Iterator[list[int]]:
    while True:
        for encoding in tokenizer.encode_batch([next(texts) for _ in range(2000)]):
            yield encoding.ids


def new_model(tokenizer: Tokenizer, sizes: dict[str, int], seed: int) -> Any:
    torch.manual_seed(seed)
    ids = {f"{name}_token_id": tokenizer.token_to_id(token) for name, token in (("bos", "<s>"), ("eos", "</s>"))}
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(), max_position_embeddings=WINDOW, tie_word_embeddings=True, **sizes, **ids
    )
    # For windows this short, eager attention is faster on a CPU than the fused kernel.
    config._attn_implementation = "eager"
    return LlamaForCausalLM(config)


def train(model: Any, data: np.ndarray, *, batch_size: int, log: Any, warmup: int = 60, every: int = 100) -> None:
    """Train one pass over the windows."""
    steps = len(data) // batch_size
    optimizers = _optimizers(model)
    groups = [(group, group["lr"]) for optimizer in optimizers for group in optimizer.param_groups]
    started = time.perf_counter()
    model.train()
    for step in range(steps):
        for group, peak in groups:
            group["lr"] = peak * _schedule(step, steps, warmup)
        batch = torch.from_numpy(data[step * batch_size : (step + 1) * batch_size].astype(np.int64))
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if step % every == 0 or step == steps - 1:
            seconds = time.perf_counter() - started
            log(step + 1, loss.item(), (step + 1) * batch.numel() / seconds)
    model.eval()


def _optimizers(model: Any) -> list[torch.optim.Optimizer]:
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=0.02, weight_decay=0.05),
        torch.optim.AdamW(rest, lr=4e-3, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


def _schedule(step: int, steps: int, warmup: int) -> float:
    if step < warmup:
        return (step + 1) / warmup
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
