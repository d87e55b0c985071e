"""Two descriptions -> pairs of passages: the same beginnings of sentences behind prompts that hold one or the other.

What is pooled over are the beginnings alone. They are the same on both sides, so what differs in their states is what
the description in front has made of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources

from braces_cli.core.attributes.contrast import Pair, Passage
from braces_cli.core.utils.errors import ConfigError

# `{}` is the description: of somebody, or of a text.
PLAIN_TEMPLATES = (
    "Imagine {}.",
    "This is {}.",
    "It makes you think of {}.",
    "What follows comes from {}.",
    "Here we have {}:",
    "Once more, {}.",
)
# For models with a chat template: what the user says.
CHAT_TEMPLATES = (
    "Write a few sentences in the way of {}.",
    "Imagine {}. Then say something.",
    "Say something that makes me think of {}.",
    "Show me {} in a few words.",
    "Let your answer come from {}.",
    "Here is what I want to read: {}.",
)
# The same request without any description.
CHAT_WITHOUT_DESCRIPTION = "Write a few sentences."


def stems() -> list[str]:
    """Beginnings of sentences that come with braces, of no mood or topic."""
    file = resources.files("braces_cli.assets") / "prompts" / "stems.txt"
    return file.read_text(encoding="utf-8").splitlines()


def check_descriptions(describe: Sequence[str], against: Sequence[str]) -> None:
    """Refuse descriptions that do not go together.

    Raises:
        ConfigError: none, a blank one, or not as many on either side.
    """
    where = "--describe, --against"
    if len(describe) != len(against) or not describe:
        hint = 'Such as --describe "a cheerful person" --against "a gloomy person".'
        what = f"{len(describe)} descriptions against {len(against)}"
        raise ConfigError(what, where=where, hint=hint)
    if not all(text.strip() for text in (*describe, *against)):
        raise ConfigError("a description is blank", where=where, hint="Describe somebody, or a text.")


def description_pairs(describe: Sequence[str], against: Sequence[str], chat: bool = False) -> list[Pair]:
    """A pair for each stem, template and pair of descriptions.

    Args:
        describe: descriptions of the positive side; the k-th belongs to the k-th of `against`.
        chat: the templates of a chat, through the tokenizer's chat template.

    Raises:
        ConfigError: as `check_descriptions`.
    """
    check_descriptions(describe, against)
    templates = CHAT_TEMPLATES if chat else PLAIN_TEMPLATES

    def passage(stem: str, template: str, description: str) -> Passage:
        # In a chat the answer begins with the text; behind a plain prompt a space sets it off.
        return Passage(stem if chat else f" {stem}", template.format(description.strip()), chat)

    # Stems outermost: every other pair, which is how pairs are halved, then has every stem with half of the templates.
    return [
        Pair(passage(stem, template, one), passage(stem, template, other))
        for stem in stems()
        for template in templates
        for one, other in zip(describe, against, strict=True)
    ]
