"""What speaks for an attribute, as items of `core.attributes.odds`: next tokens after neutral prompts, texts, or what
a description in front makes the model say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor

from braces_cli.core.attributes.contrast import Pair, Passage, passage_tokens
from braces_cli.core.attributes.odds import Item, by_length, neutral_prompts, neutral_rows
from braces_cli.core.models.loading import input_device
from braces_cli.core.models.tokenization import encode, encode_word
from braces_cli.core.session import Session

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
