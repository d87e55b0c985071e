"""A prompt as a user's turn of a chat, through the tokenizer's own template."""

from __future__ import annotations

from typing import Any

from braces_cli.core.models.tokenization import IGNORED, Encoded, bare_ids, common_length
from braces_cli.core.utils.errors import DataError, first_line


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
