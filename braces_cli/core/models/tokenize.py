"""The one way text becomes tokens in braces: for training, for scoring and as a prompt.

Special tokens in front follow the tokenizer's own policy. The end token is learnt in training (`end=True`) and never
stands at the end of a prompt, whatever the tokenizer would append.

Examples of different length as one rectangle of tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from braces_cli.core.errors import DataError, ModelError, first_line
from braces_cli.core.models.hub import is_panic
from braces_cli.core.schema import cut

IGNORED = -100  # the label that torch's cross entropy leaves out


@dataclass(frozen=True)
class Encoded:
    """Tokens of one example.

    Attributes:
        ids: token ids.
        labels: the same ids, `IGNORED` where a token is not scored.
        ended: the last token is the end token.
        truncated: tokens were cut off.
    """

    ids: list[int]
    labels: list[int]
    ended: bool
    truncated: bool

    @property
    def scored(self) -> int:
        """Scored tokens; the first token of a sequence has nothing before it and is never scored."""
        return sum(label != IGNORED for label in self.labels[1:])


def encode(
    tokenizer: Any, prompt: str, completion: str | None = None, *, end: bool = False, max_length: int | None = None
) -> Encoded:
    """Encode `prompt`, or `prompt + completion` of which only the completion is scored.

    The two are encoded as one text, as they will be read, so a token that spans both counts as completion.

    Args:
        end: append the tokenizer's end token, as text to learn from.
        max_length: keep this many tokens from the front.
    """
    ids = _plain(tokenizer, prompt + (completion or ""))
    start = 0 if completion is None else common_length(ids, _plain(tokenizer, prompt))
    if not ids:
        ids = [_first(tokenizer)]
    if end and tokenizer.eos_token_id is not None:
        ids = [*ids, tokenizer.eos_token_id]
    truncated = max_length is not None and len(ids) > max_length
    ids = ids[:max_length]
    labels = [IGNORED] * min(start, len(ids)) + ids[start:]
    return Encoded(ids, labels, end and not truncated and tokenizer.eos_token_id is not None, truncated)


def encode_word(tokenizer: Any, word: str) -> list[int]:
    """A word as it stands inside a sentence: one leading space, no special tokens."""
    bare = bare_ids(tokenizer, word)
    # SentencePiece tokenizers put a space before every text themselves; another would be a token of its own.
    if bare and str(tokenizer.convert_ids_to_tokens(bare[0])).startswith(("▁", "Ġ")):
        return bare
    return bare_ids(tokenizer, f" {word}")


def bare_ids(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a text and nothing else, no special tokens around them.

    Raises:
        ModelError: the tokenizer fails.
    """
    return _ids(tokenizer, text, add_special_tokens=False)


def all_ids(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a text, with the special tokens that the tokenizer puts around it; raises as `bare_ids` does."""
    return _ids(tokenizer, text)


def _ids(tokenizer: Any, text: str, **options: Any) -> list[int]:
    try:
        # The rest of what a tokenizer returns would take a fifth of the time that it has for thousands of rows.
        encoding = tokenizer(text, return_attention_mask=False, return_token_type_ids=False, **options)
        ids: list[int] = encoding["input_ids"]
    except MemoryError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        # tokenizers raises plain Exception, tokenizers in Python raise anything.
        what = f"the tokenizer fails on `{cut(text)}`: {first_line(error)}"
        where = str(getattr(tokenizer, "name_or_path", "") or "--model")
        raise ModelError(what, where=where, hint="Check its tokenizer.json.") from error
    return ids


def decode_continuation(tokenizer: Any, prompt_ids: list[int], new_ids: list[int]) -> str:
    """Text of `new_ids` as it continues the prompt, with the space in front that decoding it alone would lose."""
    before = tokenizer.decode(prompt_ids, skip_special_tokens=True)
    whole = tokenizer.decode([*prompt_ids, *new_ids], skip_special_tokens=True)
    return whole[len(before) :] if whole.startswith(before) else tokenizer.decode(new_ids, skip_special_tokens=True)


def token_text(tokenizer: Any, token_id: int) -> str:
    """One token as it reads in the middle of a text, with the space in front that decoding it alone can lose."""
    text: str = tokenizer.decode([token_id])
    piece = tokenizer.convert_ids_to_tokens(token_id)
    return f" {text}" if str(piece).startswith("▁") and not text.startswith(" ") else text


def context_length(config: Any, tokenizer: Any) -> int:
    """Tokens that a model of this config takes at once, or as its tokenizer says; 2,048 where neither does."""
    config = config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        value = getattr(config, name, None)
        if isinstance(value, (int, float)) and value >= 1:
            return int(value)
    limit = getattr(tokenizer, "model_max_length", None)
    return int(limit) if isinstance(limit, (int, float)) and 0 < limit < 10**9 else 2048


def _plain(tokenizer: Any, text: str) -> list[int]:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        what = "half a character (a lone surrogate), which no tokenizer takes"
        raise DataError(what, where=cut(text), hint="Remove it from the text.") from error
    ids = all_ids(tokenizer, text)
    end = tokenizer.eos_token_id
    # Drop an end token that the tokenizer appended, not one that is also its start token and stands alone.
    if len(ids) > 1 and ids[-1] == end and not text.endswith(str(tokenizer.eos_token)):
        return ids[:-1]
    return ids


def common_length(one: list[int], other: list[int]) -> int:
    """How many tokens the two begin with in common."""
    count = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        count += 1
    return count


def _first(tokenizer: Any) -> int:
    """A token to start from where the text is empty and the tokenizer puts none in front."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def pad_right(examples: Sequence[Encoded], pad_id: int) -> dict[str, Tensor]:
    """`input_ids`, `attention_mask` and `labels`, each (examples, longest), padded behind."""
    width = max(len(example.ids) for example in examples)
    shape = (len(examples), width)
    ids = torch.full(shape, pad_id)
    mask = torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, IGNORED)
    for row, example in enumerate(examples):
        length = len(example.ids)
        ids[row, :length] = torch.tensor(example.ids)
        mask[row, :length] = 1
        labels[row, :length] = torch.tensor(example.labels)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def pad_left(prompts: Sequence[Sequence[int]], pad_id: int) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask`, each (prompts, longest), padded in front, as generation needs it."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad_id)
    mask = torch.zeros((len(prompts), width), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(list(prompt))
        mask[row, width - len(prompt) :] = 1
    return {"input_ids": ids, "attention_mask": mask}


def by_length(examples: Sequence[Encoded], batch_size: int) -> Iterator[list[int]]:
    """Indices in batches of similar length, longest first, so that memory trouble shows at once."""
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i].ids))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]
