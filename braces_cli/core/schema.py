"""The boundary of files: JSON, YAML and the headers of safetensors files -> typed records.

    CONFIG = Kind(AdapterConfig, ModelError, "The file is damaged; train again.")
    config = read(CONFIG, folder / "adapter_config.json")

A record is a dataclass, a TypedDict or an annotation with ranges; msgspec converts to it. An error has the kind's class
and names the file, the key, the value and the expected type.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

import msgspec

from braces_cli.core.errors import BracesError, ConfigError, DataError, ModelError, near_misses
from braces_cli.core.files import check_regular

T = TypeVar("T")
# Numbers in records. JSON numbers from 2**53 on are not exact in other languages.
Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
Size = Annotated[int, msgspec.Meta(ge=1, le=2**53)]
Positive = Annotated[float, msgspec.Meta(gt=0)]
Relevance = Annotated[str, msgspec.Meta(pattern=r"^(input|output)\Z")]
# A path cannot contain a null character.
Name = Annotated[str, msgspec.Meta(pattern=r"^[^\x00]+\Z")]
# Characters of a value in a message.
_SHOWN = 60
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_TOO_DEEP = "lists or objects are nested too deep"
# The limit of the safetensors library, in bytes.
_HEADER_LIMIT = 100_000_000


@dataclass(frozen=True)
class Kind(Generic[T]):
    """A kind of file.

    Attributes:
        schema: type of the content; JSON objects become dataclasses, typed dictionaries or dictionaries.
        error: class of the errors.
        hint: what the user can do about an invalid file.
        what: noun for a missing file.
        closed: refuse keys that the dataclass `schema` does not have.
    """

    schema: type[T]
    error: type[BracesError]
    hint: str
    what: str = "file"
    closed: bool = False


# A line of JSON Lines, or a row of a list.
ROW: Kind[Any] = Kind(object, DataError, "Fix or remove the line.")
# JSON that a library has just written, or that comes with the base.
WRITTEN: Kind[dict[str, Any]] = Kind(dict[str, Any], ModelError, "Check the file.")
_YAML: Kind[dict[str, Any]] = Kind(dict[str, Any], ConfigError, "Write one `key: value` per line.")


class Malformed(ValueError):
    """Text that is not JSON or YAML.

    Attributes:
        message: what is wrong.
        line: from 1, if known.
        end: for a complete JSON value followed by more text: index of the first character after the value.
    """

    def __init__(self, message: str, line: int | None = None, end: int | None = None) -> None:
        super().__init__(message)
        self.message, self.line, self.end = message, line, end


def decode(text: str) -> Any:
    """Return the value of a JSON text; NaN and Infinity, as Python writes them, are numbers.

    Raises:
        Malformed: not JSON, nested too deep, or a lone surrogate, which no tokenizer accepts.
    """
    try:
        value = json.loads(text)
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        end = error.pos if error.msg == "Extra data" else None
        what = f"broken JSON: {error.msg} (column {error.colno})" if text.strip() else "the text is empty"
        raise Malformed(what, error.lineno, end) from error
    except UnicodeEncodeError as error:
        raise Malformed("a lone surrogate (half of a character)") from error
    except RecursionError as error:
        raise Malformed(_TOO_DEEP) from error
    except ValueError as error:  # Python converts at most 4,300 digits to a number
        raise Malformed("a number of more than 4,300 digits") from error
    return value


def decode_yaml(text: str) -> Any:
    """Return the value of a YAML text, {} if it is empty; all scalars except null stay text, as on the command line.

    Raises:
        Malformed: not YAML, or a key that is named twice.
    """
    import yaml

    tags = [None, *(f"tag:yaml.org,2002:{name}" for name in ("str", "null", "seq", "map"))]

    class Loader(yaml.SafeLoader):
        yaml_constructors = {tag: yaml.SafeLoader.yaml_constructors[tag] for tag in tags}  # noqa: RUF012
        # `off` is a word, `-4:4:1` is not a number in base 60, and 2001-01-01 is not a date.
        yaml_implicit_resolvers = {  # noqa: RUF012
            first: [each for each in resolvers if each[0].endswith(":null")]
            for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            mapping = super().construct_mapping(node, deep)
            seen: set[Any] = set()
            for key, _ in node.value:
                if key.value in seen:
                    raise Malformed(f"`{cut(key.value)}` is named twice", key.start_mark.line + 1)
                seen.add(key.value)
            return mapping

    try:
        value = yaml.load(text, Loader)
        return {} if value is None else value
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise Malformed(f"not YAML: {getattr(error, 'problem', error)}", mark and mark.line + 1) from error
    except RecursionError as error:
        raise Malformed(_TOO_DEEP) from error


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the keys and values of a YAML file of settings; raises ConfigError."""
    return parse(_YAML, _bytes(_YAML, path), str(path), decode_yaml)


def read(kind: Kind[T], path: Path, decoder: Callable[[str], Any] = decode) -> T:
    """Return the content of a file, JSON by default.

    Raises:
        BracesError: of the class `kind.error`: missing, not a file, not UTF-8, malformed, or not as in the schema.
    """
    return parse(kind, _bytes(kind, path), str(path), decoder)


def parse(kind: Kind[T], data: str | bytes, where: str, decoder: Callable[[str], Any] = decode) -> T:
    """Return the content of JSON text that came from `where`; raises as `read` does."""
    try:
        value = decoder(data if isinstance(data, str) else data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise kind.error(f"not UTF-8 (byte {error.start})", where=where, hint=kind.hint) from error
    except Malformed as error:
        place = f"{where}:{error.line}" if error.line and len(data.splitlines()) > 1 else where
        raise kind.error(error.message, where=place, hint=kind.hint) from error
    return check(kind, value, where)


def check(kind: Kind[T], value: Any, where: str) -> T:
    """Convert plain values to the schema; raises as `read` does."""
    if kind.closed and isinstance(value, dict) and is_dataclass(kind.schema):
        known = [field.name for field in fields(kind.schema)]
        for key in value:
            if key not in known:
                hint = f"{near_misses(str(key), known)} {kind.hint}".strip()
                raise kind.error(f"unknown key `{cut(key)}`", where=where, hint=hint)
    try:
        result: T = msgspec.convert(value, kind.schema, str_keys=True)
    except (msgspec.ValidationError, UnicodeEncodeError) as error:
        raise kind.error(_explained(str(error), value), where=where, hint=kind.hint) from error
    return result


def stored_form(value: Any) -> Any:
    """Return `value` as JSON returns it: lists for tuples, text for keys."""
    return json.loads(json.dumps(value))


def read_metadata(path: Path, kind: Kind[Any]) -> dict[str, str]:
    """Read the metadata of a safetensors file without torch; raises an error of the class `kind.error`."""
    data = _bytes(kind, path, 8)
    size = int.from_bytes(data, "little")
    if len(data) < 8 or size > _HEADER_LIMIT or path.stat().st_size < 8 + size:
        what = f"not a {kind.what}: a safetensors header is missing" if data else "the file is empty"
        raise kind.error(what, where=str(path), hint=kind.hint)
    header = parse(Kind(dict[str, Any], kind.error, kind.hint), _bytes(kind, path, 8 + size)[8:], str(path))
    return check(Kind(dict[str, str], kind.error, kind.hint), header.get("__metadata__", {}), str(path))


def cut(text: object) -> str:
    """Shorten a value for a message."""
    plain = str(text).encode("utf-8", "backslashreplace").decode()
    return plain if len(plain) <= _SHOWN else f"{plain[:_SHOWN]}..."


def _bytes(kind: Kind[Any], path: Path, count: int = -1) -> bytes:
    check_regular(path, kind.error, kind.hint, kind.what)
    try:
        with path.open("rb") as file:
            return file.read(count)
    except OSError as error:
        raise kind.error(f"cannot read: {error.strerror or error}", where=str(path), hint=kind.hint) from error


def _explained(error: str, value: Any) -> str:
    """Return msgspec's message with the key and the value that it refers to."""
    message, _, path = error.partition(" - at `")
    path = path.removeprefix("key` in `").rstrip("`").removeprefix("$").removeprefix(".")
    message = message[:1].lower() + re.sub(r", got .*", "", message)[1:].replace("`", "")
    for name, index in re.findall(r"([^.\[\]]+)|\[(\d+|\.\.\.)\]", path):
        try:
            value = value[int(index)] if index else value[name]
        except (LookupError, TypeError, ValueError):  # msgspec does not report the key of a dictionary
            return f"`{path}`: {message}"
    is_list = isinstance(value, (dict, list))
    shown = f"{type(value).__name__} of {len(value)}" if is_list else cut(json.dumps(value, default=str))
    what = message if message.startswith("object") else f"{message}, this is {shown}"
    return f"`{path}`: {what}" if path else what
