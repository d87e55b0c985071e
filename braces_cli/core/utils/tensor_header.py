"""The header of a safetensors file: names, shapes and places of its tensors, and its metadata. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from braces_cli.core.utils.decoding import cut
from braces_cli.core.utils.documents import Count, Kind, check, check_is_file, parse

# The same limit as that of the safetensors library.
_LIMIT = 100_000_000


class TensorPlace(TypedDict):
    """Where a tensor lies: its first byte and the one behind it, counted from the end of the header."""

    dtype: str
    shape: list[Count]
    data_offsets: tuple[Count, Count]


@dataclass(frozen=True)
class TensorHeader:
    """A header.

    Attributes:
        metadata: what the writer noted.
        tensors: name -> where it lies.
        start: byte of the file that tensors are counted from.
    """

    metadata: dict[str, str]
    tensors: dict[str, TensorPlace]
    start: int


def read_tensor_header(path: Path, kind: Kind[Any]) -> TensorHeader:
    """The header of a file; `kind` gives class and hint of errors.

    Raises:
        BracesError: of the class `kind.error`: no file, or no safetensors file.
    """
    where = str(path)
    check_is_file(kind, path)
    try:
        with path.open("rb") as file:
            first = file.read(8)
            size = int.from_bytes(first, "little")
            data = file.read(size) if len(first) == 8 and size <= _LIMIT else b""
    except OSError as error:
        raise kind.error(f"cannot read: {error.strerror or error}", where=where, hint=kind.hint) from error
    if not size or len(data) < size:
        what = "the file is empty" if not first else f"no {kind.what}: it has no header of safetensors"
        raise kind.error(what, where=where, hint=kind.hint)
    # The metadata of files that others wrote is theirs: no concern of ours until it is asked for.
    header = parse(Kind(dict[str, dict[str, Any]], kind.error, kind.hint, foreign=True), data, where)
    metadata = check(Kind(dict[str, str], kind.error, kind.hint), header.pop("__metadata__", {}), where)
    tensors = check(Kind(dict[str, TensorPlace], kind.error, kind.hint), header, where)
    for name, place in tensors.items():
        if place["data_offsets"][0] > place["data_offsets"][1]:
            raise kind.error(f"tensor {cut(name)} ends before it begins", where=where, hint=kind.hint)
    return TensorHeader(metadata, tensors, 8 + size)
