"""The one boundary of files: JSON, YAML and the headers of safetensors files -> typed records.

    CONFIG = Kind(AdapterConfig, ModelError, "The file is damaged; train again.")
    config = read(CONFIG, folder / "adapter_config.json")

A record is a dataclass, a TypedDict or a plain annotation, with ranges; msgspec converts to it. Whatever is wrong with
a file ends in an error of the kind's class that names the file, the key, what stands there and what belongs there.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, TypedDict, TypeVar

import msgspec

from braces_cli.core.errors import BracesError, ConfigError, DataError, ModelError, near_misses
from braces_cli.core.files import check_regular

T = TypeVar("T")
# Numbers in records. JSON numbers from 2**53 on are not exact in other languages, and no size or step is that large.
Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
Size = Annotated[int, msgspec.Meta(ge=1, le=2**53)]
Positive = Annotated[float, msgspec.Meta(gt=0)]
# The name of something: a path with a null character in it is no path.
Name = Annotated[str, msgspec.Meta(pattern=r"^[^\x00]+\Z")]
# Characters of a value that a message shows.
_SHOWN = 60
# The escape of a surrogate: two of them are a character, one is half of one.
_HALF = re.compile(r"\\u[dD][89a-fA-F]")
_YAML_TAGS = [f"tag:yaml.org,2002:{name}" for name in ("str", "null", "seq", "map")]
# The same limit as that of the safetensors library.
_HEADER_LIMIT = 100_000_000


@dataclass(frozen=True)
class Kind(Generic[T]):
    """What a file holds.

    Attributes:
        schema: type of the whole; JSON objects become dataclasses, typed dictionaries or plain ones.
        error: class of the errors.
        hint: what the user can do about a file that is wrong.
        what: what the file is called where it is not there or cannot be read.
        closed: a key that the dataclass `schema` has not is an error.
    """

    schema: type[T]
    error: type[BracesError]
    hint: str
    what: str = "file"
    closed: bool = False


# A line of JSON Lines, or what stands for one.
ROW: Kind[Any] = Kind(object, DataError, "Fix or remove the line.")
# JSON that a library has written a moment ago, or that the base brings along.
WRITTEN: Kind[dict[str, Any]] = Kind(dict[str, Any], ModelError, "Check the file.")


class Malformed(ValueError):
    """Text that is not JSON or YAML.

    Attributes:
        message: what is wrong.
        line: from 1, where it is known.
        end: of a whole JSON value that more text follows: the index of the first character behind it.
    """

    def __init__(self, message: str, line: int | None = None, end: int | None = None) -> None:
        super().__init__(message)
        self.message, self.line, self.end = message, line, end


def decode(text: str) -> Any:
    """The value of a JSON text; NaN and Infinity, as Python writes them, are numbers.

    Raises:
        Malformed: not JSON, too deep, or half a character, which no tokenizer takes.
    """
    try:
        value = json.loads(text)
        if _HALF.search(text):
            _check_halves(value)
    except json.JSONDecodeError as error:
        end = error.pos if error.msg == "Extra data" else None
        what = f"broken JSON: {error.msg} (column {error.colno})" if text.strip() else "there is nothing in it"
        raise Malformed(what, error.lineno, end) from error
    except Malformed:
        raise
    except RecursionError as error:
        raise Malformed("lists or objects too deep inside each other") from error
    except ValueError as error:  # Python turns no more than 4,300 digits into a number
        raise Malformed("a number of more than 4,300 digits") from error
    return value


def decode_yaml(text: str) -> Any:
    """The value of a YAML text; every scalar but null stays text, so that it means what it does on the command line.

    Raises:
        Malformed: not YAML, a tag, an alias, or a key that comes twice.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise Malformed("an alias, which is not read here", self.peek_event().start_mark.line + 1)
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            mapping = super().construct_mapping(node, deep)
            seen = [key.value for key, _ in node.value]
            for (key, _), value in zip(node.value, seen, strict=True):
                if seen.count(value) > 1:
                    raise Malformed(f"`{cut(value)}` is named twice", key.start_mark.line + 1)
            return mapping

    # Other tags make sets, dates and bytes, none of which is a setting.
    Loader.yaml_constructors = {tag: yaml.SafeLoader.yaml_constructors[tag] for tag in (None, *_YAML_TAGS)}
    # `off` is a word, `-4:4:1` no number of seconds, and 2001-01-01 no date.
    Loader.yaml_implicit_resolvers = {
        first: [each for each in resolvers if each[0].endswith(":null")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    try:
        value = yaml.load(text, Loader)
        _check_halves(value)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise Malformed(f"not YAML: {getattr(error, 'problem', error)}", mark and mark.line + 1) from error
    except RecursionError as error:
        raise Malformed("lists or mappings too deep inside each other") from error
    return value


def _check_halves(value: Any) -> None:
    """Raises Malformed: text with half a character, which no tokenizer takes."""
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        raise Malformed("half a character (a lone surrogate)") from error


def read_yaml(path: Path, hint: str) -> dict[str, Any]:
    """Keys and values of a YAML file of settings.

    Raises:
        ConfigError: missing, no file, not UTF-8, not YAML, or no mapping.
    """
    kind = Kind(dict[str, Any], ConfigError, hint)
    value = _decoded(kind, _bytes(kind, path), str(path), decode_yaml)
    return check(kind, {} if value is None else value, str(path))


def read(kind: Kind[T], path: Path) -> T:
    """The content of a JSON file.

    Raises:
        BracesError: of the class `kind.error`: missing, no file, not UTF-8, malformed, or not what the schema says.
    """
    return parse(kind, _bytes(kind, path), str(path))


def parse(kind: Kind[T], data: str | bytes, where: str) -> T:
    """The content of JSON that came from `where`; raises as `read` does."""
    return check(kind, _decoded(kind, data, where, decode), where)


def check(kind: Kind[T], value: Any, where: str) -> T:
    """Plain values as what the schema says; raises as `read` does."""
    if kind.closed and isinstance(value, dict) and is_dataclass(kind.schema):
        known = [field.name for field in fields(kind.schema)]
        for key in value:
            if key not in known:
                hint = f"{near_misses(str(key), known)} {kind.hint}".strip()
                raise kind.error(f"unknown key `{cut(key)}`", where=where, hint=hint)
    try:
        result: T = msgspec.convert(value, kind.schema, str_keys=True)
    except msgspec.ValidationError as error:
        raise kind.error(_explained(str(error), value), where=where, hint=kind.hint) from error
    except UnicodeEncodeError as error:  # msgspec quotes the text in its message
        raise kind.error("half a character (a lone surrogate)", where=where, hint=kind.hint) from error
    return result


def check_is_file(kind: Kind[Any], path: Path) -> None:
    """Refuse what must not be opened, see `check_regular`; raises an error of the class `kind.error`."""
    check_regular(path, kind.error, kind.hint, kind.what)


def stored_form(value: Any) -> Any:
    """What a value becomes by being written as JSON and read again: tuples as lists, keys as text."""
    return json.loads(json.dumps(value))


class TensorPlace(TypedDict):
    """Where a tensor lies: its first byte and the one behind it, counted from the end of the header."""

    dtype: str
    shape: list[Count]
    data_offsets: tuple[Count, Count]


@dataclass(frozen=True)
class TensorHeader:
    """The header of a safetensors file.

    Attributes:
        metadata: what the writer noted.
        tensors: name -> where it lies.
        start: byte of the file that tensors are counted from.
    """

    metadata: dict[str, str]
    tensors: dict[str, TensorPlace]
    start: int


def read_tensor_header(path: Path, kind: Kind[Any]) -> TensorHeader:
    """The header of a safetensors file, read without torch; `kind` gives class and hint of errors.

    Raises:
        BracesError: of the class `kind.error`: no file, or no safetensors file.
    """
    data = _bytes(kind, path, 8)
    size = int.from_bytes(data, "little")
    if len(data) < 8 or size > _HEADER_LIMIT or path.stat().st_size < 8 + size:
        what = f"no {kind.what}: it has no header of safetensors" if data else "the file is empty"
        raise kind.error(what, where=str(path), hint=kind.hint)
    header = parse(Kind(dict[str, Any], kind.error, kind.hint), _bytes(kind, path, 8 + size)[8:], str(path))
    metadata = check(Kind(dict[str, str], kind.error, kind.hint), header.pop("__metadata__", {}), str(path))
    tensors = check(Kind(dict[str, TensorPlace], kind.error, kind.hint), header, str(path))
    for name, place in tensors.items():
        if place["data_offsets"][0] > place["data_offsets"][1]:
            raise kind.error(f"tensor {cut(name)} ends before it begins", where=str(path), hint=kind.hint)
    return TensorHeader(metadata, tensors, 8 + size)


def cut(text: object) -> str:
    """Text for a message: short, and fit for every stream."""
    plain = str(text).encode("utf-8", "backslashreplace").decode()
    return plain if len(plain) <= _SHOWN else f"{plain[:_SHOWN]}..."


def _bytes(kind: Kind[Any], path: Path, count: int = -1) -> bytes:
    check_is_file(kind, path)
    try:
        with path.open("rb") as file:
            return file.read(count)
    except OSError as error:
        raise kind.error(f"cannot read: {error.strerror or error}", where=str(path), hint=kind.hint) from error


def _decoded(kind: Kind[Any], data: str | bytes, where: str, decoder: Any) -> Any:
    try:
        return decoder(data if isinstance(data, str) else data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise kind.error(f"not UTF-8 (byte {error.start})", where=where, hint=kind.hint) from error
    except Malformed as error:
        place = f"{where}:{error.line}" if error.line and len(data.splitlines()) > 1 else where
        raise kind.error(error.message, where=place, hint=kind.hint) from error


def _explained(error: str, value: Any) -> str:
    """An error of msgspec with the key and the value that it is about."""
    message, _, path = error.partition(" - at `")
    path = path.removeprefix("key` in `").rstrip("`").removeprefix("$").removeprefix(".")
    message = message[:1].lower() + re.sub(r", got .*", "", message)[1:].replace("`", "")
    for name, index in re.findall(r"([^.\[\]]+)|\[(\d+|\.\.\.)\]", path):
        try:
            value = value[int(index)] if index else value[name]
        except (LookupError, TypeError, ValueError):  # the key of a dictionary is not told
            return f"`{path}`: {message}"
    shown = (
        f"{type(value).__name__} of {len(value)}"
        if isinstance(value, (dict, list))
        else cut(json.dumps(value, default=str))
    )
    what = message if message.startswith("object") else f"{message}, this is {shown}"
    return f"`{path}`: {what}" if path else what
