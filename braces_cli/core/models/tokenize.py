"""Text and chats as tokens, for training, scoring and prompts; padding and batches.

Special tokens at the start follow the tokenizer. The end token is added for training only (`end=True`), and never to a
prompt.

In a chat only the turns of the assistant are scored. A template with `{% generation %}` marks them. In any other, an
assistant turn is the text between the chat before it, with the generation prompt, and the chat up to and including it.
Each must be a prefix of the next: templates that rewrite earlier turns (leaving out their thoughts, say) are refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from braces_cli.core.errors import DataError, ModelError, first_line
from braces_cli.core.models.hub import is_rust_panic
from braces_cli.core.schema import cut

IGNORED = -100  # label without loss in torch's cross entropy
# A template is a program: it raises TemplateError, and errors of the Python code that it runs.
_TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RuntimeError)
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


@dataclass(frozen=True)
class Encoded:
    """Tokens of one example.

    Attributes:
        ids: token ids.
        labels: the same ids, `IGNORED` for tokens that are not scored.
        ended: the last token is the end token.
        truncated: tokens were cut off.
    """

    ids: list[int]
    labels: list[int]
    ended: bool
    truncated: bool

    @property
    def scored(self) -> int:
        """Number of scored tokens; the first token of a sequence is never scored."""
        return sum(label != IGNORED for label in self.labels[1:])


def encode(
    tokenizer: Any, prompt: str, completion: str | None = None, *, end: bool = False, max_length: int | None = None
) -> Encoded:
    """Encode `prompt`, or `prompt + completion` with only the completion scored.

    Both are encoded as one text, so a token that spans both belongs to the completion.

    Args:
        end: append the end token, with loss.
        max_length: keep this many tokens from the front.
    """
    ids = _prompt_ids(tokenizer, prompt + (completion or ""))
    start = 0 if completion is None else common_length(ids, _prompt_ids(tokenizer, prompt))
    if not ids:
        # An empty text, and a tokenizer without a start token: text can be generated from any token.
        special = (tokenizer.bos_token_id, tokenizer.eos_token_id, 0)
        ids = [next(token for token in special if token is not None)]
    if end and tokenizer.eos_token_id is not None:
        ids = [*ids, tokenizer.eos_token_id]
    truncated = max_length is not None and len(ids) > max_length
    ids = ids[:max_length]
    labels = [IGNORED] * min(start, len(ids)) + ids[start:]
    return Encoded(ids, labels, end and not truncated and tokenizer.eos_token_id is not None, truncated)


def _prompt_ids(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a text without an end token that the tokenizer appends."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        message = "the text contains a lone surrogate, which tokenizers do not accept"
        raise DataError(message, where=cut(text), hint="Remove it from the text.") from error
    ids = token_ids(tokenizer, text)
    # A single end token can also be the start token.
    if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id and not text.endswith(str(tokenizer.eos_token)):
        return ids[:-1]
    return ids


def encode_word(tokenizer: Any, word: str) -> list[int]:
    """Encode a word inside a sentence: with one leading space, without special tokens."""
    bare = token_ids(tokenizer, word, special=False)
    # SentencePiece tokenizers put a space before every text; a second one would be a separate token.
    if bare and str(tokenizer.convert_ids_to_tokens(bare[0])).startswith(("▁", "Ġ")):
        return bare
    return token_ids(tokenizer, f" {word}", special=False)


def token_ids(tokenizer: Any, text: str, *, special: bool = True) -> list[int]:
    """Tokens of a text, with the special tokens that the tokenizer adds if `special` is true."""
    try:
        # The other results of a tokenizer would take a fifth of the time for thousands of rows.
        encoding = tokenizer(text, add_special_tokens=special, return_attention_mask=False, return_token_type_ids=False)
        ids: list[int] = encoding["input_ids"]
    except MemoryError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and not is_rust_panic(error):
            raise
        # tokenizers raises plain Exception, and tokenizers written in Python can raise anything.
        message = f"the tokenizer fails on `{cut(text)}`: {first_line(error)}"
        where = str(getattr(tokenizer, "name_or_path", "") or "--model")
        raise ModelError(message, where=where, hint="Check its tokenizer.json.") from error
    return ids


def common_length(one: list[int], other: list[int]) -> int:
    """Number of tokens in the common prefix of two lists."""
    differ = (place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differ, min(len(one), len(other)))


def decode_continuation(tokenizer: Any, prompt_ids: list[int], new_ids: list[int]) -> str:
    """Text of `new_ids` after the prompt, with the leading space that decoding `new_ids` alone would lose."""
    before = tokenizer.decode(prompt_ids, skip_special_tokens=True)
    whole = tokenizer.decode([*prompt_ids, *new_ids], skip_special_tokens=True)
    return whole[len(before) :] if whole.startswith(before) else tokenizer.decode(new_ids, skip_special_tokens=True)


def token_text(tokenizer: Any, token_id: int) -> str:
    """Text of one token inside a sentence, with the leading space that decoding it alone can lose."""
    text: str = tokenizer.decode([token_id])
    piece = tokenizer.convert_ids_to_tokens(token_id)
    return f" {text}" if str(piece).startswith("▁") and not text.startswith(" ") else text


def context_length(config: Any, tokenizer: Any) -> int:
    """Largest number of tokens of a model, by its config, else by its tokenizer, else 2,048."""
    config = config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        value = getattr(config, name, None)
        if isinstance(value, (int, float)) and value >= 1:
            return int(value)
    limit = getattr(tokenizer, "model_max_length", None)
    return int(limit) if isinstance(limit, (int, float)) and 0 < limit < 10**9 else 2048


def pad_right(examples: Sequence[Encoded], pad_id: int) -> dict[str, Tensor]:
    """`input_ids`, `attention_mask` and `labels`, each (examples, longest), padded on the right."""
    ids, labels = (
        [torch.tensor(row, dtype=torch.long) for row in rows]
        for rows in ([each.ids for each in examples], [each.labels for each in examples])
    )
    return {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad_id),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
    }


def pad_left(prompts: Sequence[Sequence[int]], pad_id: int) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask`, each (prompts, longest), padded on the left for generation."""
    ids = [torch.tensor(prompt) for prompt in prompts]
    mask = [torch.ones_like(row) for row in ids]
    return {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad_id, padding_side="left"),
        "attention_mask": pad_sequence(mask, batch_first=True, padding_side="left"),
    }


def by_length(examples: Sequence[Encoded], batch_size: int) -> Iterator[list[int]]:
    """Indices in batches of similar length, longest first, so that a lack of memory shows at the start."""
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i].ids))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def has_template(tokenizer: Any) -> bool:
    """Return whether a tokenizer has a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def chat_ids(tokenizer: Any, prompt: str) -> tuple[int, ...]:
    """Tokens of a chat with `prompt` as the user's turn, up to the generation prompt."""
    # Templates write special tokens themselves.
    return tuple(token_ids(tokenizer, _chat_text(tokenizer, prompt), special=False))


# A text that no template contains.
_CONTENT = "Qx7"


def turn_ends(tokenizer: Any) -> list[str]:
    """Tokens and texts that end an assistant's turn in the chat template: of an answer, and of a tool call.

    An end is the first special token after the content, else the last added token, else the text after an answer.
    """
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": _CONTENT}}}
    added = getattr(tokenizer, "added_tokens_decoder", {})
    ends = []
    for turn in ({"content": _CONTENT}, {"content": "", "tool_calls": [call]}):
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", **turn}]
        try:
            text = tokenizer.apply_chat_template(turns, tokenize=False)
        except Exception:  # a template can raise anything
            continue
        _, content, tail = text.rpartition(_CONTENT)
        ids = token_ids(tokenizer, tail, special=False)
        special = [i for i in ids if i in tokenizer.all_special_ids or (i in added and added[i].special)]
        found = special[:1] or [i for i in ids if i in added][-1:]
        if content and (found or "tool_calls" not in turn):
            ends.append(tokenizer.convert_ids_to_tokens(found[0]) if found else tail.strip())
    return list(dict.fromkeys(filter(None, ends)))


def end_tokens(model: Any, tokenizer: Any, ends: Iterable[str] = ()) -> list[int]:
    """End tokens of the generation config, of the tokenizer, and those of `ends` that are one token."""
    named = getattr(model.generation_config, "eos_token_id", None)
    ids = [*(named if isinstance(named, list) else [named]), tokenizer.eos_token_id]
    ids += [tokenizer.convert_tokens_to_ids(end) for end in ends if is_token(tokenizer, end)]
    return sorted({token for token in ids if token is not None})


def is_token(tokenizer: Any, text: str) -> bool:
    """Return whether `text` is one token of the tokenizer."""
    return tokenizer.convert_tokens_to_ids(text) not in (None, tokenizer.unk_token_id)


def encode_answer(tokenizer: Any, prompt: str, answer: str) -> Encoded:
    """Encode the chat of `prompt` and `answer`; only the answer is scored."""
    before = _chat_text(tokenizer, prompt)
    ids = token_ids(tokenizer, before + answer, special=False)
    start = common_length(ids, token_ids(tokenizer, before, special=False))
    return Encoded(ids, [IGNORED] * start + ids[start:], False, False)


def _chat_text(tokenizer: Any, prompt: str) -> str:
    turns = [{"role": "user", "content": prompt}]
    try:
        text: str = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # a template can raise anything
        message = f"the chat template refuses it: {first_line(error)}"
        raise DataError(message, where=prompt[:60], hint="Use --no-apply-chat-template.") from error
    return text


def encode_chat(tokenizer: Any, fields: Mapping[str, Any], where: str, max_length: int | None = None) -> Encoded:
    """Encode a chat; only assistant turns are scored, each with the end token that closes it.

    If the template does not close the last turn with a special token, the tokenizer's end token is added.

    Args:
        fields: `messages`, and `tools` if there are any.
        max_length: keep this many tokens from the front.

    Raises:
        DataError: no template, invalid messages, or assistant turns that cannot be located.
    """
    messages, tools = _messages(fields, where), fields.get("tools") or None
    if not has_template(tokenizer):
        hint = "Use a model with a chat template, or rows of prompt and completion."
        raise DataError("the tokenizer has no chat template", where=where, hint=hint)
    try:
        if tokenizer.is_fast and _GENERATION.search(tokenizer.get_chat_template(tools=tools)):
            marked = tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
            ids, scored = list(marked["input_ids"]), [bool(flag) for flag in marked["assistant_masks"]]
        else:
            ids, scored = _scored_by_prefix(tokenizer, messages, tools, where)
    except _TEMPLATE_ERRORS as error:
        hint = "Fix the row; many templates require alternating turns of user and assistant."
        raise DataError(f"the chat template refuses it: {first_line(error)}", where=where, hint=hint) from error
    ids, scored = _with_end_tokens(tokenizer, ids, scored, messages[-1]["role"] == "assistant")
    truncated = max_length is not None and len(ids) > max_length
    ids, scored = ids[:max_length], scored[:max_length]
    ended = bool(ids) and scored[-1] and ids[-1] == tokenizer.eos_token_id
    labels = [token if flag else IGNORED for token, flag in zip(ids, scored, strict=True)]
    return Encoded(ids, labels, ended, truncated)


def _messages(fields: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    messages = fields["messages"]
    if not isinstance(messages, list) or not messages:
        raise DataError("`messages` must be a list of turns", where=where, hint="Fix the row.")
    for number, turn in enumerate(messages, 1):
        if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
            hint = 'A turn is {"role": ..., "content": ...}.'
            raise DataError(f"turn {number} of `messages` has no role", where=where, hint=hint)
        if not isinstance(turn.get("content"), str) and not turn.get("tool_calls"):
            hint = "The content of a turn is text."
            raise DataError(f"turn {number} of `messages` has no text content", where=where, hint=hint)
    # Parquet files and hub sets give every turn every key; a template would use null as a value.
    return [{key: value for key, value in turn.items() if value is not None or key == "content"} for turn in messages]


def _scored_by_prefix(tokenizer: Any, messages: list[dict], tools: Any, where: str) -> tuple[list[int], list[bool]]:
    """Tokens of a chat, and whether each belongs to an assistant turn, by comparing prefixes of the chat."""

    def render(turns: list[dict], prompt: bool) -> str:
        text: str = tokenizer.apply_chat_template(turns, tools=tools, tokenize=False, add_generation_prompt=prompt)
        return text

    full = render(messages, False)
    ids = token_ids(tokenizer, full, special=False)
    scored = [False] * len(ids)
    for index, turn in enumerate(messages):
        if turn["role"] != "assistant":
            continue
        before, after = render(messages[:index], True), render(messages[: index + 1], False)
        if not (after.startswith(before) and full.startswith(after)):
            hint = "Use a template with {% generation %} marks, or rows of prompt and completion."
            raise DataError(f"the chat template changes the text around turn {index + 1}", where=where, hint=hint)
        # As in `encode`, a token that spans the start of a turn belongs to the turn.
        start, end = (common_length(ids, token_ids(tokenizer, text, special=False)) for text in (before, after))
        scored[start:end] = [True] * (end - start)
    return ids, scored


def _with_end_tokens(
    tokenizer: Any, ids: list[int], scored: list[bool], ends_with_answer: bool
) -> tuple[list[int], list[bool]]:
    """Score the end token after each turn; add one after the last turn if it has no closing token."""
    end = tokenizer.eos_token_id
    if end is None:
        return ids, scored
    for index in range(1, len(ids)):
        scored[index] |= scored[index - 1] and ids[index] == end and ids[index - 1] != end
    special = {*tokenizer.all_special_ids, *(getattr(tokenizer, "added_tokens_decoder", None) or {})}
    tail = len(ids)
    while tail and not scored[tail - 1]:
        tail -= 1
    start = tail
    while start and scored[start - 1]:
        start -= 1
    if ends_with_answer and tail and not special.intersection(ids[start:tail]):
        if tail < len(ids) and ids[tail] in special:
            return ids, [*scored[:tail], True, *scored[tail + 1 :]]
        # Text of the template after the turn, such as a line break, is dropped.
        return [*ids[:tail], end], [*scored[:tail], True]
    return ids, scored
