"""Names, paths, tokens and messages of libraries, escaped for a terminal, for JSON and for Markdown."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Characters of one value, and of each part of an error message.
VALUE = 300
# Control characters (C0, DEL, C1), marks of text direction, line and paragraph separators, and lone surrogates.
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_CUT = " ... "
_MARKUP = re.compile(r"[\\`*\[\]<>|#~&$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|!(?=\[)|(?<=:)//|@(?=\w)")


def escaped(text: str, keep: str = "", limit: int | None = None) -> str:
    """Write control characters as Python does, such as `\\x1b`, except those in `keep`, and cut the result.

    Args:
        limit: characters of the result. It is cut in the middle: most names and paths differ at one of the ends.
    """

    def escape(found: re.Match[str]) -> str:
        return found[0] if found[0] in keep else found[0].encode("unicode_escape").decode("ascii")

    shown = _CONTROLS.sub(escape, text)
    if limit is None or len(shown) <= limit:
        return shown
    end = (limit - len(_CUT)) // 3
    return shown[: limit - len(_CUT) - end] + _CUT + shown[len(shown) - end :]


def number(value: float, digits: int = 4, form: str = "") -> str:
    """Return a number with significant digits, and all digits before the point: 210, not 2.1e+02."""
    text = f"{value:{form}.{digits}g}"
    return f"{value:{form}.0f}" if "e+" in text and abs(value) < 1e15 else text


def json_escaped(document: str) -> str:
    """Escape the control characters of a JSON document, except the line breaks between its parts."""
    return _CONTROLS.sub(lambda found: found[0] if found[0] == "\n" else f"\\u{ord(found[0]):04x}", document)


def one_line(text: str, limit: int = VALUE) -> str:
    """Escape all control characters, then cut the text."""
    return escaped(text, "", limit)


def error_text(message: str, where: str | None, hint: str | None) -> str:
    """Format an error as `Error: WHERE: MESSAGE`, with the hint on a second line."""
    head = f"{one_line(where)}: {one_line(message)}" if where else one_line(message)
    return f"Error: {head}" + (f"\n{one_line(hint)}" if hint else "")


def markdown_text(value: Any) -> str:
    """Escape a value for a Markdown paragraph or table cell, on one line."""
    return _MARKUP.sub(lambda found: "".join(f"\\{character}" for character in found[0]), escaped(str(value)))


def public_name(value: str) -> str:
    """Return the last part of a local path, for texts that are shared; a hub id (owner/name) stays as it is."""
    if value.startswith("peft:"):  # a method of training: the config follows
        return f"peft:{public_name(value.removeprefix('peft:'))}"
    path = Path(value)
    is_local = path.is_absolute() or value.startswith((".", "~")) or len(path.parts) > 2
    return path.name if is_local or os.path.exists(path) else value


def public_command(words: Sequence[str]) -> list[str]:
    """Return the words of a command with the last parts of local paths, also after `--option=`."""
    shown = []
    for word in words:
        option, sign, value = word.partition("=")
        has_option = bool(sign) and "/" not in option
        name = value if has_option else word
        if "/" in name and not re.match(r"\w+://", name):
            name = public_name(name)
        shown.append(f"{option}={name}" if has_option else name)
    return shown
