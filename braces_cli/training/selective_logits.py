"""Logits of the tokens that are scored, and of no others.

A prompt is read, not learnt: the logits behind its tokens take a product with the whole vocabulary and are thrown away.
So the hidden states that enter the head are picked first. What a head and what follows it (a scale, a cap) do to one
token has nothing to do with the others, so the loss and its gradients stay what they are; a probe shows whether that
holds for the model at hand.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from braces_cli.core.models.loading import input_device
from braces_cli.core.models.tokenization import IGNORED

logger = logging.getLogger("braces")

# What a forward pass of a model raises that does not take its inputs in this form.
MODEL_FAULTS = (RuntimeError, TypeError, ValueError, AttributeError, LookupError, AssertionError)


def next_tokens(labels: Tensor) -> Tensor:
    """What each token should be followed by, `IGNORED` behind the last one of a row: (rows, tokens) both."""
    return F.pad(labels, (0, 1), value=IGNORED)[:, 1:]


def mean_loss(logits: Tensor, labels: Tensor, count: Tensor | int) -> Tensor:
    """Cross entropy of the next token, in float32, summed over a block and divided by `count`.

    Args:
        labels: (rows, tokens); or (k,), the next tokens themselves, where there are logits of k scored tokens only.
        count: scored tokens of the optimizer step.
    """
    # Labels are moved rather than logits: no copy of (tokens, vocabulary).
    targets = (labels if labels.ndim == 1 else next_tokens(labels)).to(logits.device)
    flat = logits.reshape(-1, logits.shape[-1]).float()
    summed = F.cross_entropy(flat, targets.reshape(-1), ignore_index=IGNORED, reduction="sum")
    return summed / torch.as_tensor(count, device=summed.device)


def pick_scored(block: dict[str, Tensor]) -> None:
    """Give a block `scored`, the k places in rows * tokens where the next token is scored, and `labels`, those tokens.

    A block that scores nothing, or everything, stays as it is.
    """
    targets = next_tokens(block["labels"]).flatten()
    scored = (targets != IGNORED).nonzero().squeeze(1)
    if 0 < len(scored) < len(targets):
        block["scored"], block["labels"] = scored, targets[scored]


@contextmanager
def only_scored(model: Any, scored: Tensor | None) -> Iterator[None]:
    """Inside, the logits of `model` are (1, k, vocabulary), those of places `scored` (k,); None: all of them."""
    if scored is None:
        yield
        return

    def pick(head: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = args[0].flatten(0, 1)
        return hidden[scored.to(hidden.device)].unsqueeze(0), *args[1:]

    handle = model.get_output_embeddings().register_forward_pre_hook(pick)
    try:
        yield
    finally:
        handle.remove()


def can_pick(model: Any, ids: Sequence[int], tolerance: float) -> bool:
    """Whether logits of picked tokens are those that the model gives them among all.

    Args:
        ids: any few tokens.
        tolerance: for the largest difference, over the largest logit.
    """
    rows = torch.tensor([list(ids), list(ids)[::-1]], device=input_device(model))
    scored = torch.tensor([0, rows.numel() - 1], device=rows.device)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            whole = model(input_ids=rows, use_cache=False).logits.float()
            with only_scored(model, scored):
                picked = model(input_ids=rows, use_cache=False).logits.float()
    except MODEL_FAULTS as error:
        # A head that is called in a way of its own, or a model without one.
        logger.debug("logits of all tokens are computed: %s", error)
        return False
    finally:
        model.train(was_training)
    wanted = whole.flatten(0, 1)[scored.to(whole.device)]
    if picked.shape != (1, *wanted.shape):
        return False
    return bool((picked[0] - wanted).abs().max() <= tolerance * whole.abs().max())
