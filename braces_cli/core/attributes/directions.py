"""Directions of attributes at every layer, from pairs of texts or from gradients; nothing is trained.

Pairs: texts that differ in one attribute.

    positive, negative (layers, n, d)    states of each pair's passages, pooled over the tokens of their texts
    direction (layers, d)                from the middle of the two sides to the positive one, by one of REDUCTIONS

With every reduction, a direction has half the length of the difference of the two means: the middle plus the direction
is the positive side.

Gradients: the constant, added to every token of a layer, that raises the odds of an attribute at the smallest cost.

    log p_v(.)   of the model with v added to the FFN output of one layer; v = 0 is the bare model
    g            d/dv sum_t sum_w c_tw log p_v(w | tokens up to t); c is the weight of next token w as evidence
    F            mean of u u^T, u = d/dv log p_v(w) of next tokens w drawn from the model (Fisher information)
    direction    (F + r I)^-1 g, r = RIDGE times the mean of F's diagonal

Of all small v that change the model's next tokens equally, this direction raises the odds most; a difference of means
ignores this change. All gradients are at v = 0, from one backward pass per text.

Letters: T tokens, V vocabulary, d model width.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from braces_cli.core.adapter.model import Session
from braces_cli.core.attributes.pooling import Row, Watch, pooled_batches
from braces_cli.core.attributes.words import GRADIENT, neutral_prompts, neutral_texts
from braces_cli.core.models.load import input_device
from braces_cli.core.models.structure import add_to_output, only_scored
from braces_cli.core.models.tokenize import IGNORED, context_length, encode, encode_answer, encode_word
from braces_cli.core.progress import Report, silent

RIDGE = 3.0
# Random next tokens in each neutral text.
_DRAWS = 3
_ROWS = 16
# L2 penalty of the logistic regression, per mean squared state.
_PENALTY = 1e-2
# Neutral prompts before each word, if words count as texts.
_PROMPTS = 3


@dataclass(frozen=True)
class Passage:
    """A text that is pooled, after a prompt that is not.

    Attributes:
        text: the text.
        prompt: the prompt; "" for a text alone.
        chat: the prompt is a user turn and the text is the answer.
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
    """Pooled states of n pairs, (layers, n, d) each, in float32 on the CPU; `layers` are the watched tensors."""

    positive: Tensor
    negative: Tensor

    @property
    def middle(self) -> Tensor:
        """Mean over both sides of all pairs, (layers, d)."""
        return (self.positive.mean(dim=1) + self.negative.mean(dim=1)) / 2


def pair_states(
    session: Session, pairs: Sequence[Pair], watches: Sequence[Watch], *, pooling: str = "mean", report: Report = silent
) -> PairStates:
    """Return the states of both passages of every pair in the bare base.

    Args:
        watches: of the tensors to read, one for each row of the states.
        pooling: over the tokens of each text, one of `POOLINGS`.

    Raises:
        DataError: the chat template refuses a prompt.
    """
    model = session.base.model
    rows = [passage_tokens(session, side) for pair in pairs for side in (pair.positive, pair.negative)]
    states = torch.zeros(len(watches), len(rows), session.ffns[0].hidden_size)
    with session.bare():
        for indices, pooled in pooled_batches(model, watches, rows, pooling, report, "reading pairs"):
            states[:, indices] = pooled
    return PairStates(states[:, 0::2], states[:, 1::2])


def passage_tokens(session: Session, passage: Passage) -> Row:
    """Return the tokens of a passage and the place of the first token of its text; long prompts lose their start."""
    tokenizer = session.base.tokenizer
    encoder = encode_answer if passage.chat else encode
    encoded = encoder(tokenizer, passage.prompt, passage.text)
    start = sum(label == IGNORED for label in encoded.labels)
    special = set(tokenizer.all_special_ids)
    while start < len(encoded.ids) - 1 and encoded.ids[start] in special:
        start += 1
    # For a text without tokens, the last token of the prompt is pooled.
    start = min(start, len(encoded.ids) - 1)
    excess = max(len(encoded.ids) - context_length(session.base.model.config, tokenizer), 0)
    return encoded.ids[excess:], max(start - excess, 0)


def reduce_pairs(states: PairStates, reduction: str = "mean") -> Tensor:
    """Return the direction from the middle of the two sides to the positive one at each layer, (layers, d)."""
    reduce = {"mean": lambda one, other: (one - other).mean(dim=0), "pca": _pca, "logistic": _logistic}[reduction]
    directions = []
    for positive, negative in zip(states.positive.double(), states.negative.double(), strict=True):
        length = ((positive - negative).mean(dim=0) / 2).norm()
        directions.append(F.normalize(reduce(positive, negative), dim=0) * length)
    return torch.stack(directions).float()


def _pca(positive: Tensor, negative: Tensor) -> Tensor:
    """First principal component of both sides, each pair centred at its middle, towards the positive side."""
    # Centred, the sides are plus and minus half the difference, so their common mean is 0.
    differences = positive - negative
    first = torch.linalg.svd(differences, full_matrices=False).Vh[0]
    return first if float((differences @ first).sum()) >= 0 else -first


def _logistic(positive: Tensor, negative: Tensor) -> Tensor:
    """Weights of a logistic regression with an L2 penalty between the sides, each pair centred at its middle."""
    from sklearn.linear_model import LogisticRegression

    differences = (positive - negative) / 2
    # The penalty is relative to the norm of the states, so that it does not depend on their scale.
    rows = differences / differences.norm(dim=1).mean().clamp(min=1e-30)
    sides = torch.cat([rows, -rows]).numpy()
    labels = [1] * len(rows) + [0] * len(rows)
    # C is 1 / (2 penalty) for a sum of losses; the penalty here is for their mean.
    fitted = LogisticRegression(C=1 / (2 * _PENALTY * len(labels)), fit_intercept=False, max_iter=1000)
    return torch.from_numpy(fitted.fit(sides, labels).coef_[0])


def area(positive: Tensor, negative: Tensor) -> float:
    """Return the AUROC of scores (n,) against (m,); ties count one half."""
    from sklearn.metrics import roc_auc_score

    labels = [1] * len(positive) + [0] * len(negative)
    return float(roc_auc_score(labels, torch.cat([positive, negative]).numpy()))


def separation(states: PairStates, reduction: str = "mean") -> list[dict[str, Any]]:
    """Return how well the direction of one half of the pairs separates the other half at each layer, mean of both ways.

    `effect` is the mean difference of the two sides along the direction over its standard deviation among pairs,
    `auroc` that of positive against negative passages along the direction.
    """
    out: list[dict[str, Any]] = [{"effect": 0.0, "auroc": 0.0} for _ in range(len(states.positive))]
    for first in (0, 1):
        half, other = (
            PairStates(states.positive[:, start::2], states.negative[:, start::2]) for start in (first, 1 - first)
        )
        directions = reduce_pairs(half, reduction)
        for row, direction, positive, negative in zip(out, directions, other.positive, other.negative, strict=True):
            one, two = positive @ direction, negative @ direction
            gap = one - two
            row["effect"] += float(gap.mean() / gap.std(correction=0).clamp(min=1e-30)) / 2
            row["auroc"] += area(one, two) / 2
    return out


@dataclass(frozen=True)
class Item:
    """A text with weights of its next tokens as evidence of the attribute.

    Attributes:
        ids: T tokens; the next tokens after place `first` and all later places count.
        first: the first such place.
        weigh: log probabilities (T - first, V) of the bare model at these places -> c, of the same shape.
    """

    ids: tuple[int, ...]
    first: int
    weigh: Callable[[Tensor], Tensor]


def default_reduction(session: Session) -> str:
    """Return `gradient`, or `mean` if the model is offloaded: a backward pass holds all its weights at once."""
    offloaded = any(getattr(ffn.parts[0].values(), "is_offloaded", False) for ffn in session.ffns)
    return "mean" if offloaded else GRADIENT


def cheapest_directions(session: Session, items: Sequence[Item], report: Report = silent) -> Tensor:
    """Return (F + r I)^-1 g of every layer, (layers, d) in float32 on the CPU.

    Raises:
        ModelError: the model has layers without gradients.
    """
    with session.bare():
        odds = odds_gradient(session, items, report)
        return damped_solve(next_token_gradients(session, report), odds)


def odds_gradient(session: Session, items: Sequence[Item], report: Report = silent) -> Tensor:
    """Return g of every layer, the mean over items, (layers, d)."""
    total = torch.zeros(len(session.ffns), session.ffns[0].hidden_size)
    done = 0
    for batch in _batches(items, lambda item: len(item.ids)):
        with _constants(session, 1) as vectors:
            places = [range(item.first, len(item.ids)) for item in batch]
            log_p = _logits(session, [item.ids for item in batch], places).log_softmax(dim=-1)
            odds = torch.zeros((), device=log_p.device)
            for item, counted in zip(batch, log_p.split([len(each) for each in places]), strict=True):
                odds = odds + (item.weigh(counted.detach()) * counted).sum() / len(counted)
            gradients = torch.autograd.grad(odds, vectors)
        total += torch.stack([each.detach().float().cpu().reshape(-1) for each in gradients])
        done += len(batch)
        report("gradients of the odds", done, len(items))
    return total / max(len(items), 1)


def next_token_gradients(session: Session, report: Report = silent) -> Tensor:
    """Return u of next tokens drawn from the model at random places of the neutral texts, (layers, draws, d)."""
    rows, generator = _neutral_rows(session), torch.Generator().manual_seed(0)
    chances: dict[int, Tensor] = {}
    with torch.no_grad():
        for batch in _batches(range(len(rows)), lambda index: len(rows[index])):
            places = [range(len(rows[index])) for index in batch]
            found = _logits(session, [rows[index] for index in batch], places).softmax(dim=-1).cpu()
            chances |= zip(batch, found.split([len(each) for each in places]), strict=True)
    groups: dict[int, list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        groups[len(row)].append(index)
    draws: list[tuple[list[int], int, int]] = []  # tokens of a row, a place, and the next token
    alike = [group[start : start + _ROWS] for group in groups.values() for start in range(0, len(group), _ROWS)]
    for group in alike * _DRAWS:
        length = len(rows[group[0]])
        # The first token has almost no context, so its next token depends little on the text.
        drawn = torch.randint(min(1, length - 1), length, (len(group),), generator=generator).tolist()
        here = torch.stack([chances[index][place] for index, place in zip(group, drawn, strict=True)])
        tokens = torch.multinomial(here, 1, generator=generator).flatten().tolist()
        draws += zip([rows[index] for index in group], drawn, tokens, strict=True)
    gradients = []
    for batch in _batches(draws, lambda draw: len(draw[0]), _DRAWS * _ROWS):
        with _constants(session, len(batch)) as vectors:
            log_p = _logits(session, [row for row, _, _ in batch], [[place] for _, place, _ in batch]).log_softmax(-1)
            odds = log_p[torch.arange(len(batch)), [token for _, _, token in batch]].sum()
            each = torch.autograd.grad(odds, vectors)
        gradients.append(torch.stack([vector.detach().float().cpu().reshape(len(batch), -1) for vector in each]))
        report("gradients of next tokens", sum(found.shape[1] for found in gradients), len(draws))
    return torch.cat(gradients, dim=1)


def damped_solve(draws: Tensor, odds: Tensor) -> Tensor:
    """(F + r I)^-1 g with F = U^T U / n and r = RIDGE tr(F) / d, for U (layers, n, d), g (layers, d) -> (layers, d).

    The Woodbury identity makes this a system of n equations.
    """
    count, width = draws.shape[1:]
    rows, targets = draws.double(), odds.double().unsqueeze(-1)
    damping = (RIDGE * rows.square().sum(dim=(1, 2)) / (count * width)).clamp(min=1e-30)[:, None, None]
    inner = count * damping * torch.eye(count, dtype=rows.dtype) + rows @ rows.mT
    solved = (targets - rows.mT @ torch.linalg.solve(inner, rows @ targets)) / damping
    return solved.squeeze(-1).float()


def _batches(rows: Sequence[Any], length: Callable[[Any], int], most: int = _ROWS) -> list[list[Any]]:
    """Return batches of rows of similar lengths."""
    ordered = sorted(rows, key=length)
    return [ordered[start : start + most] for start in range(0, len(ordered), most)]


def _neutral_rows(session: Session) -> list[list[int]]:
    """Return the tokens of the neutral prompts and texts."""
    return [encode(session.base.tokenizer, text).ids for text in (*neutral_prompts(), *neutral_texts())]


def _logits(session: Session, rows: Sequence[Sequence[int]], places: Sequence[Sequence[int]]) -> Tensor:
    """Logits of the next token after some places of each row, (k, V) in float32, row by row.

    Rows are padded at the end, which does not change what comes before.
    """
    model, width = session.base.model, max(map(len, rows))
    padded = [[*row, *[0] * (width - len(row))] for row in rows]
    index = torch.tensor([row * width + place for row, each in enumerate(places) for place in each])
    with only_scored(model, index):
        logits: Tensor = model(input_ids=torch.tensor(padded, device=input_device(model)), use_cache=False).logits
    return (logits[0] if logits.shape[:2] == (1, len(index)) else logits.flatten(0, 1)[index]).float()


@contextmanager
def _constants(session: Session, rows: int) -> Iterator[list[Tensor]]:
    """Add a trainable zero (rows, 1, d) to the output of each FFN inside the `with` block; yields these zeros."""
    vectors = []
    with ExitStack() as stack, torch.enable_grad():
        for ffn in session.ffns:
            weight = ffn.parts[0].values()
            vector = torch.zeros(rows, 1, ffn.hidden_size, device=weight.device, requires_grad=True)
            stack.callback(add_to_output(ffn.output_module, vector).remove)
            vectors.append(vector)
        yield vectors


def word_items(session: Session, towards: Sequence[str], away: Sequence[str]) -> list[Item]:
    """Return neutral texts in which a word of `towards` should become likelier, and one of `away` less likely.

    Words count by their first token if no word of the other side begins with it. If this leaves less than half of a
    side, as with a small vocabulary, the words count as texts after neutral prompts instead.
    """
    tokenizer = session.base.tokenizer
    starts = [[encode_word(tokenizer, word)[:1] for word in words] for words in (towards, away)]
    one, other = ({token for start in side for token in start} for side in starts)
    sides = (sorted(one - other), sorted(other - one))
    if any(
        2 * sum(set(start) <= set(left) for start in side) < len(side) for side, left in zip(starts, sides, strict=True)
    ):
        prompts = neutral_prompts()
        shifts = range(0, len(prompts), len(prompts) // _PROMPTS)
        # The k-th words of both lists have the same prompts.
        passages = [
            [
                Passage(f" {word}", prompts[(place + shift) % len(prompts)])
                for place, word in enumerate(words)
                for shift in shifts
            ]
            for words in (towards, away)
        ]
        return text_items(session, *passages)

    def weigh(log_p: Tensor) -> Tensor:
        weights = torch.zeros_like(log_p)
        for sign, tokens in zip((1, -1), sides, strict=True):
            weights[:, tokens] = sign * log_p[:, tokens].softmax(dim=-1)
        return weights

    return [Item(tuple(ids), min(1, len(ids) - 1), weigh) for ids in _neutral_rows(session)]


def text_items(session: Session, towards: Sequence[Passage], away: Sequence[Passage]) -> list[Item]:
    """Return texts that should become likelier, and texts that should become less likely, by their mean over tokens."""

    def weigh(tokens: Sequence[int], sign: float, log_p: Tensor) -> Tensor:
        weights = torch.zeros_like(log_p)
        weights[torch.arange(len(tokens)), list(tokens)] = sign
        return weights

    items = []
    for sign, passages in ((1.0, towards), (-1.0, away)):
        for passage in passages:
            ids, start = passage_tokens(session, passage)
            # The token before the text predicts the text's first token.
            first = max(start - 1, 0)
            if len(ids) > first + 1:
                items.append(Item(tuple(ids[:-1]), first, partial(weigh, tuple(ids[first + 1 :]), sign)))
    return items


def description_items(session: Session, pairs: Sequence[Pair], before: str) -> list[Item]:
    """Return the texts that both sides of a pair share, without the prompts.

    After each token, c is the difference of the next-token probabilities with the positive and the negative prompt,
    mean over the pairs of a text.

    Args:
        before: user turn in place of the pairs' prompts if these are user turns, else "".
    """
    tokenizer = session.base.tokenizer
    alone = passage_tokens(session, Passage("", before, True))[0] if before else encode(tokenizer, "").ids
    # Tokens of a text -> (tokens of one side of a pair, sign).
    texts: dict[tuple[int, ...], list[tuple[list[int], float]]] = defaultdict(list)
    for pair in pairs:
        (one, start), (other, other_start) = (passage_tokens(session, side) for side in (pair.positive, pair.negative))
        # The sides cannot be compared if the end of a prompt and the start of the text are one token.
        if one[start:] == other[other_start:]:
            texts[tuple(one[start:])] += [(one, 1.0), (other, -1.0)]
    rows = [(text, ids, 2 * sign / len(sides)) for text, sides in texts.items() for ids, sign in sides]
    weights: dict[tuple[int, ...], Tensor] = {}
    with session.bare(), torch.no_grad():
        for batch in _batches(rows, lambda row: len(row[1])):
            places = [range(len(ids) - len(text), len(ids)) for text, ids, _ in batch]
            logits = _logits(session, [ids for _, ids, _ in batch], places)
            for (text, _, weight), row in zip(batch, logits.split([len(each) for each in places]), strict=True):
                added = weight * row.softmax(dim=-1)
                weights[text] = weights[text] + added if text in weights else added
    return [Item((*alone, *text), len(alone), weights[text].to) for text in texts]
