"""Negative log-likelihood per example, and perplexity over texts of any length."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from braces_cli.core.models import tokenize
from braces_cli.core.models.generate import prompt_lengths
from braces_cli.core.models.load import Base, input_device
from braces_cli.core.models.weights import double
from braces_cli.core.progress import Report, silent

# Tokens whose logits are converted to float32 at a time.
_TOKENS_AT_ONCE = 2048
_INPUTS = ("input_ids", "attention_mask")


def safe_exp(value: float) -> float:
    """Return e to the power of `value`; infinity if that exceeds a float, as for the perplexity of a broken model."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


@dataclass(frozen=True)
class Likelihood:
    """Sums over scored tokens.

    Attributes:
        nll: negative log-likelihood, nats.
        tokens: number of scored tokens.
    """

    nll: float = 0.0
    tokens: int = 0

    def __add__(self, other: Likelihood) -> Likelihood:
        return Likelihood(self.nll + other.nll, self.tokens + other.tokens)

    @property
    def loss(self) -> float:
        """Mean nats per token."""
        return self.nll / self.tokens if self.tokens else math.nan

    @property
    def perplexity(self) -> float:
        return safe_exp(self.loss)


def likelihoods(
    model: Any,
    examples: Sequence[tokenize.Encoded],
    pad_id: int,
    batch_size: int,
    report: Report = silent,
    stage: str = "scoring",
    prepare: Callable[[Sequence[int]], None] | None = None,
) -> list[Likelihood]:
    """Return the likelihood of the scored tokens of each example, with logits in float32.

    Examples of similar length share a batch; right padding is masked, so the result does not depend on the batch size.

    Args:
        prepare: called before each batch with the indices of its examples, to set what they are conditioned on.
    """
    results: list[Likelihood] = [Likelihood()] * len(examples)
    device = input_device(model)
    was_training = model.training
    model.eval()
    done = 0
    try:
        for rows in tokenize.by_length(examples, batch_size):
            chosen = [examples[i] for i in rows]
            batch = {name: tensor.to(device) for name, tensor in tokenize.pad_right(chosen, pad_id).items()}
            labels = batch.pop("labels")
            if prepare is not None:
                prepare(rows)
            # The first scored token of each row is the first that is generated.
            lengths = (labels != tokenize.IGNORED).int().argmax(dim=1, keepdim=True)
            with torch.no_grad(), prompt_lengths(lengths):
                nll = _token_nll(model(**batch, use_cache=False).logits, labels)
            scored = (labels[:, 1:] != tokenize.IGNORED).sum(dim=1).tolist()
            for index, each, count in zip(rows, nll, scored, strict=True):
                results[index] = Likelihood(float(double(each).sum()), count)
            done += len(rows)
            report(stage, done, len(examples))
    finally:
        model.train(was_training)
    return results


def _token_nll(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return -log p of each label given the tokens before it: (batch, length - 1) in float32, 0 if it is not scored."""
    targets = labels[:, 1:]
    out = torch.zeros(targets.shape, device=logits.device)
    rows = max(1, _TOKENS_AT_ONCE // max(1, targets.shape[1]))
    for start in range(0, len(targets), rows):
        part = logits[start : start + rows, :-1].float()
        goal = targets[start : start + rows]
        out[start : start + rows] = F.cross_entropy(part.mT, goal, ignore_index=tokenize.IGNORED, reduction="none")
    return out


def divergences(
    model: Any,
    rows: Sequence[Sequence[int]],
    pad_id: int,
    batch_size: int,
    contexts: Sequence[Callable[[], AbstractContextManager[Any]]],
    *,
    last: bool = False,
    prompts: bool = False,
) -> list[float]:
    """Return KL(p || q) of the next token in nats for each row of tokens, the mean over its tokens.

    Args:
        contexts: return contexts in which the model computes p and q.
        last: only the next token after the row.
        prompts: the rows are prompts; otherwise tokens after the first count as generated.
    """
    results, examples = [0.0] * len(rows), [tokenize.Encoded(list(row), list(row)) for row in rows]
    for indices in tokenize.by_length(examples, batch_size):
        batch = tokenize.pad_right([examples[index] for index in indices], pad_id)
        mask, inputs = batch["attention_mask"], {name: batch[name].to(input_device(model)) for name in _INPUTS}
        lengths, log_p = mask.sum(dim=1, keepdim=True), []
        for context in contexts:
            read = lengths if prompts else torch.ones_like(lengths)
            with context(), torch.no_grad(), prompt_lengths(read):
                log_p.append(model(**inputs, use_cache=False).logits.float().log_softmax(dim=-1))
        kl = F.kl_div(log_p[1], log_p[0], reduction="none", log_target=True).sum(dim=-1).cpu().double()
        means = kl.gather(1, lengths - 1)[:, 0] if last else (kl * mask).sum(dim=1) / lengths[:, 0]
        for index, value in zip(indices, means.tolist(), strict=True):
            results[index] = value
    return results


def continuation_likelihoods(
    base: Base, pairs: Sequence[tuple[str, str]], batch_size: int, chat: bool = False
) -> list[Likelihood]:
    """Return the likelihood of each continuation given its prompt; long prompts are cut at the beginning.

    Args:
        pairs: (prompt, continuation). The tokenizer decides on a start token, as in generation.
        chat: prompts are user turns and continuations the model's answers, if the tokenizer has a chat template.
    """
    encoder = tokenize.encode_answer if chat and tokenize.has_template(base.tokenizer) else tokenize.encode
    window = tokenize.context_length(base.model.config, base.tokenizer)
    examples = []
    for prompt, continuation in pairs:
        example = encoder(base.tokenizer, prompt, continuation)
        examples.append(tokenize.Encoded(example.ids[-window:], example.labels[-window:]))
    return likelihoods(base.model, examples, base.tokenizer.pad_token_id, batch_size)


def text_likelihoods(
    model: Any, tokenizer: Any, texts: Sequence[str], window: int, batch_size: int, report: Report = silent
) -> list[Likelihood]:
    """Return the likelihood of whole texts of any length, after exactly one start token (see `encode_text`)."""
    windows: list[tokenize.Encoded] = []
    owner: list[int] = []
    for index, text in enumerate(texts):
        parts = tokenize.encode_text(tokenizer, text, window)
        windows += parts
        owner += [index] * len(parts)
    totals = [Likelihood()] * len(texts)
    scored = likelihoods(model, windows, tokenizer.pad_token_id, batch_size, report)
    for index, likelihood in zip(owner, scored, strict=True):
        totals[index] += likelihood
    return totals
