"""Prompts as turns of a chat, for models that were tuned on them."""

from __future__ import annotations

from typing import Any

from braces_cli.core.errors import ConfigError
from braces_cli.core.session import Session


def chat_wanted(session: Session, asked: bool | None) -> bool:
    """Whether prompts go through the chat template: as asked, else as the adapter was trained.

    Raises:
        ConfigError: asked for, and the tokenizer has none.
    """
    trained = session.config.training.get("apply_chat_template") if session.config is not None else False
    wanted = bool(trained if asked is None else asked)
    if wanted and not getattr(session.base.tokenizer, "chat_template", None):
        hint = "Leave it out, or use a model that was tuned on chats."
        raise ConfigError("the tokenizer has no chat template", where="--apply-chat-template", hint=hint)
    return wanted


def chat_ids(tokenizer: Any, prompt: str) -> tuple[int, ...]:
    """Tokens of a chat in which the user has said `prompt` and the model is about to answer."""
    turns = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    # The template writes the special tokens itself, the one in front too.
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
