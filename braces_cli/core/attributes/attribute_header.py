"""The header of an attribute file: which attributes it holds, and what they were built from. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypedDict

from braces_cli.core.models.stored_fingerprint import Fingerprint
from braces_cli.core.schema import Count, Kind, Name, check, cut, parse, read_tensor_header
from braces_cli.core.utils.errors import ModelError

FORMAT_VERSION = "1"
_JSON_KEYS = ("attributes", "layers", "fingerprint", "details")


class Details(TypedDict, total=False):
    """What a listing shows of an attribute beside its words; see `core.attributes.attribute`."""

    base: Name | None
    pooling: Literal["mean", "last", "max"]
    examples: Count
    steered_layers: list[Count] | None
    provenance: dict[str, Any]
    difference: list[float] | None
    residual: list[float] | None


@dataclass(frozen=True)
class AttributeHeader:
    """Metadata of an attribute file, each value of it JSON.

    Attributes:
        attributes: name -> the words it was built from.
        layers: decoder layer of each row of the tensors.
        fingerprint: of the base.
        details: by name.
    """

    attributes: dict[Name, list[str]]
    layers: list[Count]
    fingerprint: Fingerprint
    details: dict[str, Details] = field(default_factory=dict)


HEADER = Kind(AttributeHeader, ModelError, "Build it again: attr-build.", "file of attributes", closed=True)


def read_header(path: Path) -> AttributeHeader:
    """The metadata of an attribute file.

    Raises:
        ModelError: it is none, is damaged, or of another version.
    """
    metadata = read_tensor_header(path, HEADER).metadata
    missing = {"attributes", "fingerprint", "layers"} - set(metadata)
    if missing:
        hint = "Remove it from the folder, or build it again: attr-build."
        raise ModelError(f"not an attribute file: no {', '.join(sorted(missing))}", where=str(path), hint=hint)
    version = metadata.get("format_version")
    if version != FORMAT_VERSION:
        what = f"format version {cut(version)}, this braces reads {FORMAT_VERSION}"
        raise ModelError(what, where=str(path), hint="Update braces, or build it again: attr-build.")
    text = Kind(object, ModelError, HEADER.hint)
    values = {key: parse(text, metadata[key], f"{path}, {key}") for key in _JSON_KEYS if key in metadata}
    header = check(HEADER, values, str(path))
    layers = header.fingerprint["layers"]
    if len(header.layers) != layers or header.layers != sorted(set(header.layers)):
        what = f"`layers` must name {layers} layers, each once and in order"
        raise ModelError(what, where=str(path), hint=HEADER.hint)
    return header
