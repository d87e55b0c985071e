"""The only parsers of JSON and YAML: text -> plain values, or what is wrong with the text and in which line."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, NoReturn

# Lists and objects inside each other: more than people or programs write, and few enough for every recursive function.
DEPTH = 50
_SHOWN = 60


class Malformed(ValueError):
    """Text that is not JSON or YAML, or more than that is allowed here.

    Attributes:
        message: what is wrong.
        line: from 1, where it is known.
        end: of a whole JSON value that more text follows: the index of the first character behind it.
        key: that is at fault, where it is one.
    """

    def __init__(self, message: str, line: int | None = None, end: int | None = None, key: str = "") -> None:
        super().__init__(message)
        self.message, self.line, self.end, self.key = message, line, end, key


def decode(text: str, constants: bool = False, foreign: bool = False) -> Any:
    """The value of a JSON text; see `documents.Kind` for the flags.

    Raises:
        Malformed: not JSON, too deep, a key that comes twice, a number that JSON has not, half a character.
    """
    if not text.strip():
        raise Malformed("there is nothing in it")
    try:
        value = _decoder(constants, foreign).decode(text)
    except json.JSONDecodeError as error:
        end = error.pos if error.msg == "Extra data" else None
        column = f" (column {error.colno})"
        raise Malformed(f"broken JSON: {error.msg}{column}", error.lineno, end) from error
    except RecursionError as error:
        raise Malformed(_TOO_DEEP) from error
    except Malformed as error:
        error.line = error.line or line_of(text, error.key, last=True)
        raise
    except ValueError as error:  # Python turns no more than 4,300 digits into a number
        raise Malformed("a number of more than 4,300 digits") from error
    if text.count("[") + text.count("{") > DEPTH and _is_deep(value):
        raise Malformed(_TOO_DEEP)
    if not foreign and _HALF.search(text):
        _check_halves(value)
    return value


_TOO_DEEP = f"lists or objects more than {DEPTH} deep"
# The escape of a surrogate: two of them are a character, one is half of one.
_HALF = re.compile(r"\\u[dD][89a-fA-F]")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        key = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise Malformed(f"`{cut(key)}` is named twice", key=key)
    return found


def _refused(constant: str) -> NoReturn:
    raise Malformed(f"{constant} is no number in JSON")


def _finite(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise Malformed(f"{cut(digits)} is larger than any number")
    return value


# Compiled once; rows come by the million.
_PLAIN = json.JSONDecoder()
_LOOSE = json.JSONDecoder(object_pairs_hook=_unique)
_STRICT = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refused, parse_float=_finite)


def _decoder(constants: bool, foreign: bool) -> json.JSONDecoder:
    return _PLAIN if foreign else _LOOSE if constants else _STRICT


def _is_deep(value: Any) -> bool:
    """Whether lists and objects are more than `DEPTH` deep; level by level, so that depth does no harm here."""
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(DEPTH):
        inside = (item.values() if isinstance(item, dict) else item for item in level)
        level = [child for items in inside for child in items if isinstance(child, (dict, list))]
    return bool(level)


def _check_halves(value: Any, place: str = "") -> None:
    """Raises Malformed: text or a key with half a character."""
    if isinstance(value, str) and is_half(value):
        raise Malformed(f"half a character (a lone surrogate){f' in `{cut(place)}`' if place else ''}")
    if isinstance(value, dict):
        for key, item in value.items():
            _check_halves(key, place)
            _check_halves(item, f"{place}.{key}" if place else str(key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _check_halves(item, f"{place}[{index}]")


def is_half(text: str) -> bool:
    """Whether text holds half a character: a lone surrogate, which no UTF-8 and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


# YAML 1.2: only true and false are truth values (`packing: off` is the word), and neither 1:30 nor 2001-01-01 is a
# number or a date. The rest is PyYAML's.
_BOOL = "tag:yaml.org,2002:bool"
_DROPPED = {_BOOL, "tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"}
_RESOLVED = {
    _BOOL: (r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    "tag:yaml.org,2002:int": (
        r"^(?:[-+]?0b[0-1_]+|[-+]?0[0-7_]+|[-+]?(?:0|[1-9][0-9_]*)|[-+]?0x[0-9a-fA-F_]+)$",
        "-+0123456789",
    ),
    "tag:yaml.org,2002:float": (
        r"^(?:[-+]?(?:[0-9][0-9_]*)\.[0-9_]*(?:[eE][-+][0-9]+)?|\.[0-9][0-9_]*(?:[eE][-+][0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        "-+0123456789.",
    ),
}  # fmt: skip


def decode_yaml(text: str) -> Any:
    """The value of a YAML text without tags.

    Raises:
        Malformed: not YAML, a tag, an alias of a list or mapping, too deep, a key that comes twice or is no plain text.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """Refuses what a file of settings has no use for."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            seen = set()
            for key, _ in node.value:
                line = key.start_mark.line + 1
                if not isinstance(key, yaml.ScalarNode):
                    raise Malformed("a key must be plain text", line)
                if key.value in seen:
                    raise Malformed(f"`{cut(key.value)}` is named twice", line)
                seen.add(key.value)
            return super().construct_mapping(node, deep)

    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in _DROPPED]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    for tag, (pattern, first) in _RESOLVED.items():
        Loader.add_implicit_resolver(tag, re.compile(pattern), list(first))
    try:
        _check_events(yaml.parse(text, Loader))
        value = yaml.load(text, Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise Malformed("not YAML", mark.line + 1 if mark else None) from error
    except Malformed:
        raise
    except (ValueError, RecursionError) as error:
        raise Malformed(f"not YAML: {error}") from error
    _check_halves(value)
    return value


def _check_events(events: Iterator[Any]) -> None:
    """What must be known before anything is built: aliases that multiply what they stand for, depth, tags."""
    import yaml

    depth, containers = 0, set()
    for event in events:
        line = event.start_mark.line + 1
        if getattr(event, "tag", None) is not None:
            raise Malformed(f"a tag ({cut(event.tag)}), which is not read here", line)
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            containers.add(event.anchor)
            if depth > DEPTH:
                raise Malformed(_TOO_DEEP, line)
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        elif isinstance(event, yaml.AliasEvent) and event.anchor in containers:
            raise Malformed(f"an alias of a list or mapping (*{cut(event.anchor)}), which is not read here", line)


def cut(text: object) -> str:
    """Text for a message: short, and fit for every stream."""
    plain = str(text).encode("utf-8", "backslashreplace").decode()
    return plain if len(plain) <= _SHOWN else f"{plain[:_SHOWN]}..."


def line_of(text: str, key: str, last: bool = False) -> int | None:
    """The line of a key, where it is plain to see: it stands there once, or the last one is meant."""
    if not key:
        return None
    pattern = rf"^[ \t]*(?:{re.escape(json.dumps(key))}|{re.escape(json.dumps(key, ensure_ascii=False))})[ \t]*:"
    found = list(re.finditer(pattern, text, re.MULTILINE))
    if len(found) == 1 or (found and last):
        return text.count("\n", 0, found[-1].start()) + 1
    return None
