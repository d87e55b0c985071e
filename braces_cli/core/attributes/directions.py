"""Pairs of texts that differ in one attribute -> hidden states of each side -> the direction from one to the other.

    positive, negative (layers, n, d)    states of each pair's passages, pooled over the tokens of their texts
    direction (layers, d)                from the middle of the two sides to the positive one, by one of REDUCTIONS

Whatever the reduction, a direction is as long as half the difference of the two means, so that it means the same:
adding it to the middle gives the positive side, taking it off the negative one.

Directions by gradient: what constant, added to every token of a layer, moves the odds of an attribute at least cost.

    log p_v(.)   of the model with v added to what the FFN of one layer writes; v = 0 is the bare model
    g            d/dv sum_t sum_w c_tw log p_v(w | tokens up to t), where c says which tokens speak for the attribute
    F            mean of u u^T, u = d/dv log p_v(w) of next tokens w that the model itself draws (Fisher information):
                 how much a small v changes what the model says
    direction    (F + r I)^-1 g, r = RIDGE times the mean of F's diagonal

Of all small v that change the model's next tokens equally, that direction raises the odds most. A difference of means
knows nothing of what it changes besides. All is computed at v = 0, from one backward pass a text: nothing is trained.

Letters: T tokens, V vocabulary, d model width.

Items: next tokens after neutral prompts, texts, or the continuations that a description makes likely.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import resources
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from braces_cli.core.adapter.model import Session
from braces_cli.core.attributes.pooling import Row, Watch, input_watches, output_watches, pooled_batches
from braces_cli.core.attributes.words import GRADIENT, REDUCTIONS, neutral_texts
from braces_cli.core.errors import ConfigError, DataError
from braces_cli.core.models.ffn import MixtureFFN
from braces_cli.core.models.load import input_device
from braces_cli.core.models.structure import add_to_output
from braces_cli.core.models.tokenize import IGNORED, context_length, encode, encode_answer, encode_word
from braces_cli.core.progress import Report, silent


@dataclass(frozen=True)
class Passage:
    """A text whose tokens are pooled over, behind a prompt that is only read.

    Attributes:
        chat: the prompt is a user's turn in a chat, and the text the answer.
    """

    text: str
    prompt: str = ""
    chat: bool = False


@dataclass(frozen=True)
class Pair:
    """Two passages that differ in one attribute."""

    positive: Passage
    negative: Passage


@dataclass(frozen=True)
class PairStates:
    """Pooled states of n pairs, (layers, n, d) each, in float32 on the CPU."""

    positive: Tensor
    negative: Tensor

    @property
    def middle(self) -> Tensor:
        """Mean over both sides of all pairs, (layers, d)."""
        return (self.positive.mean(dim=1) + self.negative.mean(dim=1)) / 2

    def of(self, pairs: Sequence[int]) -> PairStates:
        """The states of some pairs, by index."""
        chosen = list(pairs)
        return PairStates(self.positive[:, chosen], self.negative[:, chosen])


def pair_states(
    session: Session,
    pairs: Sequence[Pair],
    *,
    captured: str = "input",
    pooling: str = "mean",
    report: Report = silent,
) -> PairStates:
    """Run the bare base over both passages of every pair; an adapter that is attached stays out of it.

    Args:
        captured: tensor of the FFN to read, input or output.
        pooling: over the tokens of each text, one of `core.attributes.pooling.POOLINGS`.

    Raises:
        DataError: no pair, or the chat template refuses a prompt.
    """
    if not pairs:
        raise DataError("no pairs", where="--pairs", hint="Give at least one row of `positive` and `negative`.")
    model = session.base.model
    watches: list[Watch] = input_watches(session.ffns) if captured == "input" else output_watches(model, session.ffns)
    rows = [passage_tokens(session, side) for pair in pairs for side in (pair.positive, pair.negative)]
    states = torch.zeros(len(watches), len(rows), session.ffns[0].hidden_size)
    with ExitStack() as stack:
        if session.adapter is not None:
            stack.enter_context(session.adapter.disabled())
        for indices, pooled in pooled_batches(model, watches, rows, pooling, report, "reading pairs"):
            states[:, indices] = pooled
    return PairStates(states[:, 0::2], states[:, 1::2])


def passage_tokens(session: Session, passage: Passage) -> Row:
    """Tokens of a passage and where its text begins; what does not fit the model is cut from the front."""
    tokenizer = session.base.tokenizer
    max_length = context_length(session.base.model.config, tokenizer)
    if passage.chat:
        encoded = encode_answer(tokenizer, passage.prompt, passage.text)
    else:
        encoded = encode(tokenizer, passage.prompt, passage.text)
    start = sum(label == IGNORED for label in encoded.labels)
    special = set(tokenizer.all_special_ids)
    while start < len(encoded.ids) - 1 and encoded.ids[start] in special:
        start += 1
    # A text of no tokens of its own is pooled over the last token before it.
    start = min(start, len(encoded.ids) - 1)
    cut = max(len(encoded.ids) - max_length, 0)
    return encoded.ids[cut:], max(start - cut, 0)


def reduce_pairs(states: PairStates, reduction: str = "mean") -> Tensor:
    """Direction from the middle of the two sides to the positive one at each layer, (layers, d).

    Raises:
        ConfigError: no such reduction.
    """
    if reduction not in _REDUCTIONS:
        raise ConfigError(f"no reduction `{reduction}`", where="--reduction", hint=f"One of {', '.join(REDUCTIONS)}.")
    directions = []
    for positive, negative in zip(states.positive.double(), states.negative.double(), strict=True):
        mean = (positive - negative).mean(dim=0) / 2
        direction = _REDUCTIONS[reduction](positive, negative)
        directions.append(F.normalize(direction, dim=0) * mean.norm())
    return torch.stack(directions).float()


def _mean(positive: Tensor, negative: Tensor) -> Tensor:
    """Difference of means, (n, d), (n, d) -> (d,)."""
    return positive.mean(dim=0) - negative.mean(dim=0)


def _pca(positive: Tensor, negative: Tensor) -> Tensor:
    """First principal component of both sides, each pair less its own middle, turned towards the positive side."""
    differences = positive - negative
    # Less their middles the sides are plus and minus half the difference: the mean over both is 0 already.
    first = torch.linalg.svd(differences, full_matrices=False).Vh[0]
    return first if float((differences @ first).sum()) >= 0 else -first


def _logistic(positive: Tensor, negative: Tensor) -> Tensor:
    """Weights of a logistic regression that tells the sides apart, with an L2 penalty, each pair less its middle.

    The penalty is what a unit of each mean squared state costs, so that it does not depend on the scale of the states.
    """
    from sklearn.linear_model import LogisticRegression

    differences = (positive - negative) / 2
    rows = differences / differences.norm(dim=1).mean().clamp(min=1e-30)
    sides = torch.cat([rows, -rows]).numpy()
    labels = [1] * len(rows) + [0] * len(rows)
    # Its C is one over twice the penalty, for a sum of losses where the penalty here is for their mean.
    fitted = LogisticRegression(C=1 / (2 * _PENALTY * len(labels)), fit_intercept=False, max_iter=1000)
    return torch.from_numpy(fitted.fit(sides, labels).coef_[0])


_PENALTY = 1e-2

# One for each of REDUCTIONS: (n, d) states of both sides of n pairs -> a direction (d,) of any length.
_REDUCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mean": _mean, "pca": _pca, "logistic": _logistic}


def area(positive: Tensor, negative: Tensor) -> float:
    """AUROC of scores (n,) against (m,); ties count one half."""
    from sklearn.metrics import roc_auc_score

    labels = [1] * len(positive) + [0] * len(negative)
    return float(roc_auc_score(labels, torch.cat([positive, negative]).numpy()))


def separation(states: PairStates, reduction: str = "mean") -> list[dict[str, Any]]:
    """How well the direction of one half of the pairs separates the other half, at each layer, mean over both ways.

    `effect` is the mean difference of the two sides along the direction over its standard deviation among pairs;
    `auroc` the probability that a random positive passage lies further along it than a random negative one.
    """
    count = states.positive.shape[1]
    halves = (range(0, count, 2), range(1, count, 2))
    out: list[dict[str, Any]] = [{"effect": 0.0, "auroc": 0.0} for _ in range(len(states.positive))]
    for fitted, held_out in (halves, halves[::-1]):
        directions = reduce_pairs(states.of(fitted), reduction)
        other = states.of(held_out)
        for row, direction, positive, negative in zip(out, directions, other.positive, other.negative, strict=True):
            one, two = positive @ direction, negative @ direction
            gap = one - two
            row["effect"] += float(gap.mean() / gap.std(correction=0).clamp(min=1e-30)) / 2
            row["auroc"] += area(one, two) / 2
    return out


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


def next_token_gradients(session: Session, report: Report = silent) -> Tensor:
    """u of next tokens that the model draws behind random places of neutral texts, (layers, draws, d)."""
    batches = by_length(neutral_rows(session), len) * _DRAWS
    generator = torch.Generator().manual_seed(0)
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


# Prompts that each word stands behind, where words count as texts.
_PROMPTS = 3


def word_items(session: Session, towards: Sequence[str], away: Sequence[str]) -> list[Item]:
    """Neutral texts; behind each of their tokens a word of `towards` should be likelier, one of `away` less likely.

    Words count by their first token, where no word of the other side begins with it. Where that leaves less than half
    of a side, as in a small vocabulary, the words are texts behind neutral prompts instead.
    """
    tokenizer = session.base.tokenizer
    starts = [[encode_word(tokenizer, word)[:1] for word in words] for words in (towards, away)]
    one, other = ({token for start in side for token in start} for side in starts)
    sides = (sorted(one - other), sorted(other - one))
    if any(
        2 * sum(set(start) <= set(left) for start in side) < len(side) for side, left in zip(starts, sides, strict=True)
    ):
        return text_items(session, _behind_prompts(towards), _behind_prompts(away))

    def weigh(log_p: Tensor) -> Tensor:
        weights = torch.zeros_like(log_p)
        for sign, tokens in zip((1, -1), sides, strict=True):
            weights[:, tokens] = sign * log_p[:, tokens].softmax(dim=-1)
        return weights

    return [Item(tuple(ids), min(1, len(ids) - 1), weigh) for ids in neutral_rows(session)]


def _behind_prompts(words: Sequence[str]) -> list[Passage]:
    """Each word behind a few neutral prompts, the k-th word of every list behind the same ones."""
    prompts = neutral_prompts()
    return [
        Passage(f" {word}", prompts[(place + shift) % len(prompts)])
        for place, word in enumerate(words)
        for shift in range(0, len(prompts), len(prompts) // _PROMPTS)
    ]


def text_items(session: Session, towards: Sequence[Passage], away: Sequence[Passage]) -> list[Item]:
    """Texts that should be likelier, and texts that should be less likely, each by its mean over tokens."""
    items = []
    for sign, passages in ((1.0, towards), (-1.0, away)):
        for passage in passages:
            ids, start = passage_tokens(session, passage)
            # Behind the token before the text stands its first token; the first token of all is predicted by nothing.
            first = max(start - 1, 0)
            if len(ids) > first + 1:
                items.append(Item(tuple(ids[:-1]), first, partial(_following, tuple(ids[first + 1 :]), sign)))
    return items


def _following(tokens: Sequence[int], sign: float, log_p: Tensor) -> Tensor:
    weights = torch.zeros_like(log_p)
    weights[torch.arange(len(tokens)), list(tokens)] = sign
    return weights


def description_items(session: Session, pairs: Sequence[Pair], before: str) -> list[Item]:
    """Texts that both sides of a pair share, without the prompts: behind each token what the positive prompt makes of
    the next one should be likelier, and what the negative prompt makes of it less likely.

    Args:
        before: what stands in front of the texts in place of the pairs' prompts: a user's turn where these are, else
            "".
    """
    tokenizer = session.base.tokenizer
    alone = passage_tokens(session, Passage("", before, True))[0] if before else encode(tokenizer, "").ids
    # Tokens of a text -> of each side of each pair its tokens, and what they count for.
    texts: dict[tuple[int, ...], list[tuple[list[int], float]]] = {}
    for pair in pairs:
        (one, start), (other, other_start) = (passage_tokens(session, side) for side in (pair.positive, pair.negative))
        # Where a prompt's end is one token with the beginning of the text, the two sides cannot be compared.
        if one[start:] == other[other_start:]:
            texts.setdefault(tuple(one[start:]), []).extend([(one, 1.0), (other, -1.0)])
    weights = _weights(session, texts)
    return [Item((*alone, *text), len(alone), weights[text].to) for text in texts]


def _weights(
    session: Session, texts: Mapping[tuple[int, ...], Sequence[tuple[list[int], float]]]
) -> dict[tuple[int, ...], Tensor]:
    """Of each text the difference of next-token probabilities that its two sides make, (T, V), mean over pairs."""
    rows = [(text, ids, 2 * sign / len(sides)) for text, sides in texts.items() for ids, sign in sides]
    totals: dict[tuple[int, ...], Tensor] = {}
    with ExitStack() as stack, torch.no_grad():
        if session.adapter is not None:
            stack.enter_context(session.adapter.disabled())
        for batch in by_length(rows, lambda row: len(row[1])):
            ids = torch.tensor([row[1] for row in batch], device=input_device(session.base.model))
            logits = session.base.model(input_ids=ids, use_cache=False).logits
            for (text, _, weight), row in zip(batch, logits, strict=True):
                added = weight * row[-len(text) :].float().softmax(dim=-1)
                totals[text] = totals[text] + added if text in totals else added
    return totals
