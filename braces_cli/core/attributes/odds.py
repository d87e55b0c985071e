"""Directions by gradient: what constant, added to every token of a layer, moves the odds of an attribute at least cost.

    log p_v(.)   of the model with v added to what the FFN of one layer writes; v = 0 is the bare model
    g            d/dv sum_t sum_w c_tw log p_v(w | tokens up to t), where c says which tokens speak for the attribute
    F            mean of u u^T, u = d/dv log p_v(w) of next tokens w that the model itself draws (Fisher information):
                 how much a small v changes what the model says
    direction    (F + r I)^-1 g, r = RIDGE times the mean of F's diagonal

Of all small v that change the model's next tokens equally, that direction raises the odds most. A difference of means
knows nothing of what it changes besides. All is computed at v = 0, from one backward pass a text: nothing is trained.

Letters: T tokens, V vocabulary, d model width.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import resources
from typing import Any

import torch
from torch import Tensor

from braces_cli.core.attributes.word_lists import GRADIENT, neutral_texts
from braces_cli.core.models.loading import input_device
from braces_cli.core.models.module_structure import add_to_output
from braces_cli.core.models.moe import MixtureFFN
from braces_cli.core.models.tokenization import encode
from braces_cli.core.session import Session
from braces_cli.core.utils.progress import Report, silent

RIDGE = 3.0
# Draws of a place and a next token in each neutral text; 76 texts come with braces.
_DRAWS = 3
_ROWS = 16


@dataclass(frozen=True)
class Item:
    """A text and which of its next tokens speak for the attribute.

    Attributes:
        ids: T tokens; of these `first` and what follows have next tokens that count.
        first: place of the first of them.
        weigh: log probabilities (T - first, V) of the bare model behind each place -> c, of the same shape.
    """

    ids: tuple[int, ...]
    first: int
    weigh: Callable[[Tensor], Tensor]


def default_reduction(session: Session) -> str:
    """By gradient, unless the model is offloaded: a backward pass would hold all of its weights at once."""
    offloaded = any(getattr(ffn.parts[0].values(), "is_offloaded", False) for ffn in session.ffns)
    return "mean" if offloaded else GRADIENT


def cheapest_directions(session: Session, items: Sequence[Item], report: Report = silent) -> Tensor:
    """(F + r I)^-1 g of every layer, (layers, d) in float32 on the CPU; see the module's docstring."""
    with ExitStack() as stack:
        if session.adapter is not None:
            stack.enter_context(session.adapter.disabled())
        odds = odds_gradient(session, items, report)
        return damped_solve(next_token_gradients(session, report), odds)


def odds_gradient(session: Session, items: Sequence[Item], report: Report = silent) -> Tensor:
    """g of every layer, the mean over items, (layers, d)."""
    total = torch.zeros(len(session.ffns), session.ffns[0].hidden_size)
    done = 0
    for batch in by_length(items, lambda item: len(item.ids)):
        with _constants(session, 1) as vectors:
            log_p = _log_p(session, [item.ids for item in batch])
            odds = torch.zeros((), device=log_p.device)
            for item, row in zip(batch, log_p, strict=True):
                counted = row[item.first :]
                odds = odds + (item.weigh(counted.detach()) * counted).sum() / len(counted)
            gradients = torch.autograd.grad(odds, vectors)
        total += torch.stack([each.detach().float().cpu().reshape(-1) for each in gradients])
        done += len(batch)
        report("gradients of the odds", done, len(items))
    return total / max(len(items), 1)


def next_token_gradients(session: Session, report: Report = silent, seed: int = 0) -> Tensor:
    """u of next tokens that the model draws behind random places of neutral texts, (layers, draws, d)."""
    batches = by_length(neutral_rows(session), len) * _DRAWS
    generator = torch.Generator().manual_seed(seed)
    found = []
    for done, rows in enumerate(batches, 1):
        count, length = len(rows), len(rows[0])
        with _constants(session, count) as vectors:
            log_p = _log_p(session, rows)
            # The first token has little before it that would tell one text from another.
            places = torch.randint(min(1, length - 1), length, (count,), generator=generator)
            log_p = log_p[torch.arange(count), places.to(log_p.device)]
            drawn = torch.multinomial(log_p.detach().float().exp().cpu(), 1, generator=generator).to(log_p.device)
            gradients = torch.autograd.grad(log_p.gather(1, drawn).sum(), vectors)
        found.append(torch.stack([each.detach().float().cpu().reshape(count, -1) for each in gradients]))
        report("gradients of next tokens", done, len(batches))
    return torch.cat(found, dim=1)


def damped_solve(draws: Tensor, odds: Tensor, ridge: float = RIDGE) -> Tensor:
    """(F + r I)^-1 g with F = U^T U / n and r = ridge tr(F) / d, for U (layers, n, d), g (layers, d) -> (layers, d).

    By Woodbury, so that what is solved is n by n, whatever d.
    """
    count, width = draws.shape[1:]
    rows, targets = draws.double(), odds.double().unsqueeze(-1)
    damping = (ridge * rows.square().sum(dim=(1, 2)) / (count * width)).clamp(min=1e-30)[:, None, None]
    inner = count * damping * torch.eye(count, dtype=rows.dtype) + rows @ rows.mT
    solved = (targets - rows.mT @ torch.linalg.solve(inner, rows @ targets)) / damping
    return solved.squeeze(-1).float()


def by_length(rows: Sequence[Any], length: Callable[[Any], int]) -> list[list[Any]]:
    """Batches of rows of one length, so that there is no padding."""
    groups: dict[int, list[Any]] = defaultdict(list)
    for row in rows:
        groups[length(row)].append(row)
    return [group[start : start + _ROWS] for group in groups.values() for start in range(0, len(group), _ROWS)]


def neutral_prompts() -> list[str]:
    """Beginnings of texts that come with braces."""
    file = resources.files("braces_cli.assets") / "prompts" / "neutral.txt"
    return file.read_text(encoding="utf-8").splitlines()


def neutral_rows(session: Session) -> list[list[int]]:
    """Tokens of the neutral prompts and texts that come with braces."""
    return [encode(session.base.tokenizer, text).ids for text in (*neutral_prompts(), *neutral_texts())]


def _log_p(session: Session, rows: Sequence[Sequence[int]]) -> Tensor:
    """Log probabilities of the next token behind each token, (rows, T, V), with gradients."""
    model = session.base.model
    batch = torch.tensor([list(row) for row in rows], device=input_device(model))
    logits: Tensor = model(input_ids=batch, use_cache=False).logits
    return logits.float().log_softmax(dim=-1)


@contextmanager
def _constants(session: Session, rows: int) -> Iterator[list[Tensor]]:
    """A constant for each layer and row, 0, added to what the FFNs write inside the `with` block: (rows, 1, d) each."""
    vectors = []
    with ExitStack() as stack, torch.enable_grad():
        for ffn in session.ffns:
            weight = ffn.parts[0].values()
            vector = torch.zeros(rows, 1, ffn.hidden_size, device=weight.device, requires_grad=True)
            place = ffn.host if isinstance(ffn, MixtureFFN) else ffn.value
            stack.callback(add_to_output(place, vector).remove)
            vectors.append(vector)
        yield vectors
