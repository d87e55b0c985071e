"""Words that attributes are built from: built-in lists, files, and what may be a name. No torch here."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from braces_cli.core.errors import ConfigError, DataError
from braces_cli.core.files import check_regular

# Files of an adapter's or a model's folder that are no attribute.
OTHER_FILES = {"attributes", "adapter_model", "model"}
# The list that every other one is held against.
REFERENCE = "neutral"
# Built-in lists that are the two ends of one axis.
_AXES = (("positive", "negative"), ("joyful", "sad"), ("formal", "casual"), ("polite", "toxic"))
OPPOSITES = {one: other for axis in _AXES for one, other in (axis, axis[::-1])}
# How the hidden states of a word's or a text's tokens become one (`core.attributes.pooling`).
POOLINGS = ("mean", "last", "max")
# How the states of many pairs become one direction (`core.attributes.directions`).
REDUCTIONS = ("mean", "pca", "logistic")
# What attr-build also takes: no direction of states, but of the odds that they lead to (`core.attributes.directions`).
GRADIENT = "gradient"
_NAME = re.compile(r"[\w][\w.-]*")


def check_name(name: str) -> str:
    """An attribute's name is also a file's name.

    Raises:
        ConfigError: it has other characters than letters, digits, `_`, `-` and dots inside.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"`{name}` cannot name an attribute", where="--attribute", hint="Use letters, digits, _ and -."
        )
    return name


def check_file_name(name: str) -> str:
    """The name of an attribute that gets a file of its own, `NAME.safetensors`.

    Raises:
        ConfigError: see `check_name`; or a file of that name is another thing in an adapter's or a model's folder.
    """
    if check_name(name) in OTHER_FILES:
        what = f"`{name}` cannot name an attribute: {name}.safetensors is a file of adapters or models"
        raise ConfigError(what, where="--attribute", hint="Choose another name.")
    return name


def built_in() -> dict[str, list[str]]:
    """The word lists that come with braces, by name."""
    from importlib import resources

    folder = resources.files("braces_cli.assets") / "words"
    lists = {}
    for file in sorted(folder.iterdir(), key=lambda file: file.name):
        if file.name.endswith(".txt"):
            lists[file.name.removesuffix(".txt")] = file.read_text(encoding="utf-8").split("\n")[:-1]
    return lists


def neutral_texts() -> list[str]:
    """Plain sentences that come with braces: what texts are held against, as words are against the neutral list."""
    from importlib import resources

    file = resources.files("braces_cli.assets") / "neutral_texts.txt"
    return file.read_text(encoding="utf-8").splitlines()


def read_words(path: Path) -> list[str]:
    """Words of a file, one a line; blank lines and lines that begin with `#` are left out.

    Raises:
        DataError: missing, not UTF-8, or no word in it.
    """
    check_regular(path, DataError, "Give a text file with one word a line.")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read: {error}", where=str(path), hint="Give UTF-8 text, one word a line.") from error
    words = clean_words([line for line in lines if not line.lstrip().startswith("#")])
    if not words:
        raise DataError("no words", where=str(path), hint="Write at least one word.")
    return words


def clean_words(words: Sequence[str]) -> list[str]:
    """Words without surrounding space, empty ones and repeats, in the order given."""
    return list(dict.fromkeys(word.strip() for word in words if word.strip()))
