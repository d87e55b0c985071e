"""Prompts as turns of a chat, for models that were tuned on them."""

from __future__ import annotations

from typing import Any

from braces_cli.core.session import Session
from braces_cli.core.utils.errors import ConfigError, DataError


def chat_wanted(session: Session, asked: bool | None) -> bool:
    """Whether prompts go through the chat template: as asked, else as the adapter was trained.

    Raises:
        ConfigError: asked for, and the tokenizer has none.
    """
    trained = session.config.training.get("chat_template") if session.config is not None else False
    wanted = bool(trained if asked is None else asked)
    if wanted and not getattr(session.base.tokenizer, "chat_template", None):
        hint = "Leave it out, or use a model that was tuned on chats."
        raise ConfigError("the tokenizer has no chat template", where="--apply-chat-template", hint=hint)
    return wanted


def chat_ids(tokenizer: Any, prompt: str) -> tuple[int, ...]:
    """Tokens of a chat in which the user has said `prompt` and the model is about to answer.

    Raises:
        DataError: the template does not take it.
    """
    turns = [{"role": "user", "content": prompt}]
    try:
        text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    except Exception as error:
        # A template is a program and may raise anything.
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        hint = "Use --no-apply-chat-template."
        raise DataError(f"the chat template refuses it: {first[:200]}", where=prompt[:60], hint=hint) from error
    # The template writes the special tokens itself, the one in front too.
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
