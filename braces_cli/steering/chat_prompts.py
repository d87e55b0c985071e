"""Whether prompts are turns of a chat, for models that were tuned on them."""

from __future__ import annotations

from braces_cli.core.models.chat_turns import chat_ids as chat_ids
from braces_cli.core.models.chat_turns import encode_answer as encode_answer
from braces_cli.core.models.chat_turns import has_template as has_template
from braces_cli.core.session import Session
from braces_cli.core.utils.errors import ConfigError


def uses_chat_template(session: Session, setting: bool | None) -> bool:
    """Whether prompts go through the chat template: as `setting` says, else as the adapter was trained.

    Raises:
        ConfigError: they do, and the tokenizer has none.
    """
    trained = session.config.training.get("chat_template") if session.config is not None else False
    use_template = bool(trained if setting is None else setting)
    if use_template and not has_template(session.base.tokenizer):
        hint = "Leave it out, or use a model that was tuned on chats."
        raise ConfigError("the tokenizer has no chat template", where="--apply-chat-template", hint=hint)
    return use_template
