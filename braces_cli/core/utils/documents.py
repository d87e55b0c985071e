"""Files of JSON and YAML by the schema of their kind: text -> plain values -> the typed fields of a kind of file.

    CONFIG = Kind(AdapterConfig, ModelError, "The file is damaged; train again.")
    config = read(CONFIG, folder / "adapter_config.json")

Each kind is declared beside the code that owns the file; its schema is a dataclass, a TypedDict or a plain annotation,
with ranges. Whatever is wrong with a file ends in an error of the kind's class that names the file, the line where it
is known, the key, what stands there and what belongs there.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar

import msgspec

from braces_cli.core.utils.decoding import Malformed, cut, decode, decode_yaml, line_of
from braces_cli.core.utils.errors import BracesError, DataError, ModelError, near_misses
from braces_cli.core.utils.paths import check_regular

T = TypeVar("T")
# Numbers in schemas. JSON numbers from 2**53 on are not exact in other languages, and no size or step is that large.
Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
Size = Annotated[int, msgspec.Meta(ge=1, le=2**53)]
Positive = Annotated[float, msgspec.Meta(gt=0)]
# The name of something: a path with a null character in it is no path.
Name = Annotated[str, msgspec.Meta(pattern=r"^[^\x00]+\Z")]


@dataclass(frozen=True)
class Kind(Generic[T]):
    """What a file holds.

    Attributes:
        schema: type of the whole; JSON objects become dataclasses, typed dictionaries or plain ones.
        error: class of the errors.
        hint: what the user can do about a file that is wrong.
        what: what the file is called where it is not there or cannot be read.
        syntax: of the text.
        closed: a key that the dataclass `schema` has not is an error.
        constants: NaN and Infinity, as Python writes them, are numbers.
        foreign: written and read by other programs: keys that come twice and half characters are no concern of ours.
    """

    schema: type[T]
    error: type[BracesError]
    hint: str
    what: str = "file"
    syntax: Literal["json", "yaml"] = "json"
    closed: bool = False
    constants: bool = False
    foreign: bool = False


# A line of JSON Lines, or what stands for one. Numbers may be NaN: which columns matter is known only later.
ROW: Kind[Any] = Kind(object, DataError, "Fix or remove the line.", constants=True)


# JSON that a library has written a moment ago, or that the base brings along.
WRITTEN: Kind[dict[str, Any]] = Kind(dict[str, Any], ModelError, "Check the file.", foreign=True)


def read(kind: Kind[T], path: Path) -> T:
    """The content of a file.

    Raises:
        BracesError: of the class `kind.error`: missing, no file, not UTF-8, malformed, or not what the schema says.
    """
    return parse(kind, _bytes(kind, path), str(path))


def _bytes(kind: Kind[Any], path: Path) -> bytes:
    check_is_file(kind, path)
    try:
        return path.read_bytes()
    except OSError as error:
        raise kind.error(f"cannot read: {error.strerror or error}", where=str(path), hint=kind.hint) from error


def check_is_file(kind: Kind[Any], path: Path) -> None:
    """Refuse what must not be opened, see `check_regular`.

    Raises:
        BracesError: of the class `kind.error`.
    """
    check_regular(path, kind.error, kind.hint, kind.what)


def parse(kind: Kind[T], data: str | bytes, where: str) -> T:
    """The content of text that came from `where`; raises as `read` does."""
    text = ""
    try:
        text = data if isinstance(data, str) else data.decode("utf-8-sig")
        value = decode_yaml(text) if kind.syntax == "yaml" else decode(text, kind.constants, kind.foreign)
    except UnicodeDecodeError as error:
        raise kind.error(f"not UTF-8 (byte {error.start})", where=where, hint=kind.hint) from error
    except Malformed as error:
        many = "\n" in text.strip()
        place = f"{where}:{error.line}" if error.line and many else where
        raise kind.error(error.message, where=place, hint=kind.hint) from error
    return check(kind, value, where, text)


def check(kind: Kind[T], value: Any, where: str, text: str = "") -> T:
    """Plain values as what the schema says.

    Args:
        text: that the values were read from, for the line of a key.

    Raises:
        BracesError: see `read`.
    """
    if kind.closed and isinstance(value, dict) and is_dataclass(kind.schema):
        known = [field.name for field in fields(kind.schema)]
        for key in value:
            if key not in known:
                hint = f"{near_misses(str(key), known)} {kind.hint}".strip()
                raise kind.error(f"unknown key `{cut(str(key))}`", where=_place(where, text, key), hint=hint)
    try:
        result: T = msgspec.convert(value, kind.schema, str_keys=True)
    except msgspec.ValidationError as error:
        key, message = _explained(str(error), value)
        raise kind.error(message, where=_place(where, text, key), hint=kind.hint) from error
    except UnicodeEncodeError as error:  # msgspec quotes the text in its message
        raise kind.error("half a character (a lone surrogate)", where=where, hint=kind.hint) from error
    return result


def stored_form(value: Any) -> Any:
    """What a value becomes by being written as JSON and read again: tuples as lists, keys as text."""
    return decode(json.dumps(value), foreign=True)


# What msgspec calls the types of JSON.
_WORDS = {
    "int": "a whole number", "float": "a number", "str": "text", "bool": "true or false", "array": "a list",
    "object": "an object", "null": "null",
}  # fmt: skip


def _explained(error: str, value: Any) -> tuple[str, str]:
    """The key at the top that an error of msgspec is about, and the error in words."""
    message, _, path = error.partition(" - at `")
    path = path.rstrip("`").removeprefix("$").removeprefix(".")
    if path.startswith("key` in"):
        path, message = path.partition("$")[2].removeprefix("."), f"{message} as a key"
    missing = re.fullmatch(r"Object missing required field `(.*)`", message)
    if missing:
        return _first(path), f"no key `{path}.{missing[1]}`" if path else f"no key `{missing[1]}`"
    message = re.sub(r", got .*", "", message)
    message = re.sub(r"`([^`]*)`", lambda match: _type_words(match[1]), message)
    message = message[:1].lower() + message[1:]
    there, known = _at(value, path)
    if not path:
        return "", f"this is {_shown(value)}, {message}" if message.startswith("expected") else message
    found = f"is {_shown(there)}, " if known else ""
    return _first(path), f"`{path}` {found}{message}"


def _type_words(names: str) -> str:
    return " or ".join(_WORDS.get(name, f"`{name}`") for name in names.split(" | "))


def _first(path: str) -> str:
    return re.split(r"[.\[]", path)[0]


def _at(value: Any, path: str) -> tuple[Any, bool]:
    """The value at a path such as `layers[0].name`, and whether there is one; the key of a dictionary is not told."""
    for name, index in re.findall(r"([^.\[\]]+)|\[(\d+|\.\.\.)\]", path):
        try:
            value = value[int(index)] if index else value[name]
        except (LookupError, TypeError, ValueError):
            return None, False
    return value, bool(path)


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return f"an object of {len(value)} keys"
    if isinstance(value, list) and (len(value) > 4 or any(isinstance(item, (dict, list)) for item in value)):
        return f"a list of {len(value)}"
    if isinstance(value, int) and abs(value) >= 10**18:
        return "a number of more than 18 digits"
    return cut(json.dumps(value, default=str))


def _place(where: str, text: str, key: Any) -> str:
    line = line_of(text, str(key)) if "\n" in text.strip() else None
    return f"{where}:{line}" if line else where


def line_of_setting(path: Path, key: str) -> str:
    """`file:line` of a key at the margin of a YAML file that was read before; the file where it cannot be told."""
    text = path.read_text(encoding="utf-8-sig")
    found = list(re.finditer(rf"^[\"']?{re.escape(key)}[\"']?[ \t]*:", text, re.MULTILINE))
    return f"{path}:{text.count(chr(10), 0, found[0].start()) + 1}" if len(found) == 1 else str(path)
