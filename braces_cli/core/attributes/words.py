"""Names of attributes, and the word lists, prompts and texts that are part of the package. No torch here."""

import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from braces_cli.core.errors import ConfigError, DataError
from braces_cli.core.files import check_regular

# Safetensors files of an adapter or a model: not attributes.
OTHER_FILES = {"attributes", "adapter_model", "model"}
# The list that is the reference of every list without an opposite.
REFERENCE = "neutral"
# Built-in lists that are the two ends of one axis.
_AXES = (("positive", "negative"), ("joyful", "sad"), ("formal", "casual"), ("polite", "toxic"))
OPPOSITES = {one: other for axis in _AXES for one, other in (axis, axis[::-1])}
# Pooling of the hidden states of a word or a text over tokens (`core.attributes.pooling`).
POOLINGS = ("mean", "last", "max")
# Reductions of the states of many pairs to one direction (`core.attributes.directions`).
REDUCTIONS = ("mean", "pca", "logistic")
# The direction that is the gradient of log odds, not a difference of states.
GRADIENT = "gradient"
_NAME = re.compile(r"[\w][\w.-]*")


def check_name(name: str) -> str:
    """Refuse a name of an attribute that cannot be the name of a file.

    Raises:
        ConfigError: a character that is not a letter, a digit, `_`, `-` or a dot inside.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"`{name}` cannot name an attribute", where="--attribute", hint="Use letters, digits, _ and -."
        )
    return name


def check_file_name(name: str) -> str:
    """Refuse a name whose file `NAME.safetensors` means something else in the folder of an adapter or a model.

    Raises:
        ConfigError: such a name, or one that `check_name` refuses.
    """
    if check_name(name) in OTHER_FILES:
        what = f"`{name}` cannot name an attribute: {name}.safetensors is a file of adapters or models"
        raise ConfigError(what, where="--attribute", hint="Choose another name.")
    return name


def built_in() -> dict[str, list[str]]:
    """Return the built-in word lists by name."""
    files = sorted((resources.files("braces_cli.assets") / "words").iterdir(), key=lambda file: file.name)
    return {
        file.name.removesuffix(".txt"): file.read_text(encoding="utf-8").splitlines()
        for file in files
        if file.name.endswith(".txt")
    }


def neutral_texts() -> list[str]:
    """Return neutral sentences: the reference of texts, as the neutral list is the reference of words."""
    return _lines("neutral_texts.txt")


def neutral_prompts() -> list[str]:
    """Return the beginnings of neutral texts."""
    return _lines("prompts/neutral.txt")


def stems() -> list[str]:
    """Return beginnings of sentences without mood or topic."""
    return _lines("prompts/stems.txt")


def templates(chat: bool) -> list[str]:
    """Return texts, or user turns of a chat, with `{}` for the description of a person or a text."""
    return _lines("prompts/chat_templates.txt" if chat else "prompts/templates.txt")


def _lines(path: str) -> list[str]:
    return (resources.files("braces_cli.assets") / path).read_text(encoding="utf-8").splitlines()


def read_words(path: Path) -> list[str]:
    """Read words from a file, one per line; blank lines and lines that begin with `#` are skipped.

    Raises:
        DataError: a file that is missing, is not UTF-8, or has no words.
    """
    check_regular(path, DataError, "Give a text file with one word per line.")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read: {error}", where=str(path), hint="Give UTF-8 text, one word per line.") from error
    words = clean_words([line for line in lines if not line.lstrip().startswith("#")])
    if not words:
        raise DataError("no words", where=str(path), hint="Write at least one word.")
    return words


def clean_words(words: Sequence[str]) -> list[str]:
    """Return the words without surrounding space, blanks and repeats, in order."""
    return list(dict.fromkeys(word.strip() for word in words if word.strip()))
