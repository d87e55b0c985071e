"""Text that comes from elsewhere (names, tokens, paths, messages of libraries) made fit to print. Light: the standard
library only.

Small numeric functions that several rooms need. Light: only the standard library.
"""

from __future__ import annotations

import math
import re

# Characters of one value, and of the message of an error; an error as a whole stays well below 1,000.
VALUE = 300
# Control characters (C0, DEL, C1), marks that change the direction of text, separators of lines and paragraphs, and
# halves of characters: a terminal may obey them, or show a line as two.
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_CUT = " ... "


def escaped(text: str, keep: str = "") -> str:
    """`text` with control characters written as Python writes them, such as `\\x1b`; those in `keep` stay."""

    def escape(found: re.Match[str]) -> str:
        return found[0] if found[0] in keep else found[0].encode("unicode_escape").decode("ascii")

    return _CONTROLS.sub(escape, text)


def json_escaped(document: str) -> str:
    """A JSON document without control characters but the line breaks between its parts; what it says stays the same."""
    # Inside strings JSON has escaped line breaks already.
    return _CONTROLS.sub(lambda found: found[0] if found[0] == "\n" else f"\\u{ord(found[0]):04x}", document)


def shortened(text: str, limit: int = VALUE) -> str:
    """At most `limit` characters of a text: its beginning and its end, where most names and paths differ."""
    if len(text) <= limit:
        return text
    end = (limit - len(_CUT)) // 3
    return text[: limit - len(_CUT) - end] + _CUT + text[len(text) - end :]


def one_line(text: str, limit: int = VALUE) -> str:
    """`text` escaped, line breaks too, and cut."""
    return shortened(escaped(text), limit)


def error_text(message: str, where: str | None, hint: str | None) -> str:
    """An error as it is printed: `WHERE: MESSAGE`, and the hint on a second line."""
    head = f"{one_line(where)}: {one_line(message)}" if where else one_line(message)
    return f"Error: {head}" + (f"\n{one_line(hint)}" if hint else "")


def safe_exp(value: float) -> float:
    """e to the power of `value`; infinity where that exceeds a float, as with the perplexity of a broken model."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def whole_number(text: str) -> int | None:
    """The number that text of up to 18 digits says, None for any other text.

    `str.isdigit` takes "²" as well, and `int` the digits of every script but no more than 4,300 of them.
    """
    return int(text) if re.fullmatch("[0-9]{1,18}", text) else None
