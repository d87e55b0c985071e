"""A prompt as a user's turn of a chat, through the tokenizer's own template.

Chats as the tokenizer's own template writes them, with what the assistant says as the scored part.

A template that marks it with `{% generation %}` is taken at its word. Of any other, an assistant turn is what the chat
up to and with it has more than the chat before it with the generation prompt, provided that each is a prefix of the
next: templates that rewrite earlier turns (leaving out their thoughts, say) are refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from jinja2 import TemplateError

from braces_cli.core.errors import DataError, first_line
from braces_cli.core.models.tokenize import IGNORED, Encoded, bare_ids, common_length


def has_template(tokenizer: Any) -> bool:
    """Whether a tokenizer comes with a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def chat_ids(tokenizer: Any, prompt: str) -> tuple[int, ...]:
    """Tokens of a chat in which the user has said `prompt` and the model is about to answer.

    Raises:
        DataError: the template does not take it.
    """
    return tuple(_ids(tokenizer, _chat_text(tokenizer, prompt)))


def encode_answer(tokenizer: Any, prompt: str, answer: str) -> Encoded:
    """Tokens of the chat in which `answer` follows `prompt`; only the answer is scored.

    Raises:
        DataError: the template does not take the prompt.
    """
    before = _chat_text(tokenizer, prompt)
    ids = _ids(tokenizer, before + answer)
    start = common_length(ids, _ids(tokenizer, before))
    return Encoded(ids, [IGNORED] * start + ids[start:], False, False)


def _chat_text(tokenizer: Any, prompt: str) -> str:
    turns = [{"role": "user", "content": prompt}]
    try:
        text: str = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    except Exception as error:
        # A template is a program and may raise anything.
        hint = "Use --no-apply-chat-template."
        what = f"the chat template refuses it: {first_line(error)}"
        raise DataError(what, where=prompt[:60], hint=hint) from error
    return text


def _ids(tokenizer: Any, chat: str) -> list[int]:
    # The template writes the special tokens itself, the one in front too.
    return bare_ids(tokenizer, chat)


# A template is a program: besides its own errors it raises those of the Python that it runs.
_PROGRAM_FAULTS = (TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RuntimeError)
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


def encode_chat(tokenizer: Any, fields: Mapping[str, Any], where: str, max_length: int | None = None) -> Encoded:
    """Encode a chat; only the assistant's turns are scored, each with the end token that closes it.

    Where the template closes the last turn with no special token, the tokenizer's end token is put there.

    Args:
        fields: `messages`, and `tools` where there are any.
        max_length: keep this many tokens from the front.

    Raises:
        DataError: no template, messages that are none or that it does not take, or turns that cannot be told apart.
    """
    messages, tools = _messages(fields, where), fields.get("tools") or None
    if not getattr(tokenizer, "chat_template", None):
        hint = "Use a model with a chat template, or rows of prompt and completion."
        raise DataError("the tokenizer has no chat template", where=where, hint=hint)
    try:
        marked = tokenizer.is_fast and _GENERATION.search(tokenizer.get_chat_template(tools=tools))
        ids, scored = (_by_mark if marked else _by_prefix)(tokenizer, messages, tools)
    except _Unclear as error:
        hint = "Use a template with {% generation %} marks, or rows of prompt and completion."
        raise DataError(str(error), where=where, hint=hint) from error
    except (TemplateError, *_PROGRAM_FAULTS) as error:
        hint = "Fix the row; many templates require alternating turns of user and assistant."
        raise DataError(f"the chat template refuses it: {first_line(error)}", where=where, hint=hint) from error
    ids, scored = _closed(tokenizer, ids, scored, messages[-1]["role"] == "assistant")
    truncated = max_length is not None and len(ids) > max_length
    ids, scored = ids[:max_length], scored[:max_length]
    ended = bool(ids) and scored[-1] and ids[-1] == tokenizer.eos_token_id
    labels = [token if flag else IGNORED for token, flag in zip(ids, scored, strict=True)]
    return Encoded(ids, labels, ended, truncated)


class _Unclear(Exception):
    """The template does not show which part of the text an assistant turn is."""


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
    # Columns of Parquet files and hub sets give every turn every key; to a template, null would be a value.
    return [{key: value for key, value in turn.items() if value is not None or key == "content"} for turn in messages]


def _by_mark(tokenizer: Any, messages: list[dict], tools: Any) -> tuple[list[int], list[bool]]:
    done = tokenizer.apply_chat_template(
        messages, tools=tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    return list(done["input_ids"]), [bool(flag) for flag in done["assistant_masks"]]


def _by_prefix(tokenizer: Any, messages: list[dict], tools: Any) -> tuple[list[int], list[bool]]:
    def render(turns: list[dict], prompt: bool) -> str:
        text: str = tokenizer.apply_chat_template(turns, tools=tools, tokenize=False, add_generation_prompt=prompt)
        return text

    def encode(text: str) -> list[int]:
        return bare_ids(tokenizer, text)

    full = render(messages, False)
    ids = encode(full)
    scored = [False] * len(ids)
    for index, turn in enumerate(messages):
        if turn["role"] != "assistant":
            continue
        before, after = render(messages[:index], True), render(messages[: index + 1], False)
        if not (after.startswith(before) and full.startswith(after)):
            raise _Unclear(f"the chat template rewrites what stands around turn {index + 1}")
        # As in `encode`, a token that spans the start of a turn counts as said.
        start, end = common_length(ids, encode(before)), common_length(ids, encode(after))
        scored[start:end] = [True] * (end - start)
    return ids, scored


def _closed(tokenizer: Any, ids: list[int], scored: list[bool], last: bool) -> tuple[list[int], list[bool]]:
    """Score the end token behind each turn; where the last turn has no closing token at all, add one."""
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
    if last and tail and not special.intersection(ids[start:tail]):
        if tail < len(ids) and ids[tail] in special:
            return ids, [*scored[:tail], True, *scored[tail + 1 :]]
        # Whatever the template writes behind the turn (a line break, say) is no part of it.
        return [*ids[:tail], end], [*scored[:tail], True]
    return ids, scored
