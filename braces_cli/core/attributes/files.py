"""The header of an attribute file: which attributes it holds, and what they were built from. No torch here.

Which attributes there are and what they were built from, read from the headers of their files: no torch here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypedDict

from braces_cli.core.attributes.words import OTHER_FILES, built_in
from braces_cli.core.errors import ConfigError, ModelError
from braces_cli.core.files import file_hash, path_exists
from braces_cli.core.models.identity import Fingerprint
from braces_cli.core.schema import Count, Kind, Name, check, cut, parse, read_tensor_header

FORMAT_VERSION = "1"
_JSON_KEYS = ("attributes", "layers", "fingerprint", "details")


class Details(TypedDict, total=False):
    """What a listing shows of an attribute beside its words; see `core.attributes.vector`."""

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


# Attributes that an adapter was trained with, in its folder.
TRAINED_FILE = "attributes.safetensors"


def check_folder(folder: Path | None) -> None:
    """Refuse an `--attributes` folder that cannot be read: a built-in list must not take its place without a word.

    Raises:
        ConfigError: there is no such folder, it is a file, or its entries cannot be listed.
    """
    if folder is None:
        return
    try:
        next(folder.iterdir(), None)
    except OSError as error:
        what = "no such folder" if not path_exists(folder) else f"cannot read this folder: {error.strerror}"
        hint = "Give --attributes the folder that `braces attr-build` wrote."
        raise ConfigError(what, where=str(folder), hint=hint) from error


def check_attributes(folder: Path | None) -> None:
    """Refuse an `--attributes` folder to look an attribute up in that holds none.

    Raises:
        ConfigError: see `check_folder`; or there is no attribute file in it.
    """
    check_folder(folder)
    if folder is not None and not any(folder.glob("*.safetensors")):
        hint = "Give --attributes the folder that `braces attr-build` wrote."
        raise ConfigError("no attribute file in this folder", where=str(folder), hint=hint)


def attribute_hashes(names: Iterable[str], folders: Iterable[Path | None]) -> list[str]:
    """SHA-256 of each file that one of the attributes may come from.

    Raises:
        ModelError: a file that cannot be read.
    """
    files = [TRAINED_FILE, *(f"{name}.safetensors" for name in names)]
    there = [folder / file for folder in folders if folder is not None for file in files]
    return [file_hash(file, ModelError) for file in there if path_exists(file)]


def list_attributes(folder: Path | None, adapter: Path | None) -> list[dict[str, Any]]:
    """Attributes in the order in which `--attribute` looks for them: of `folder`, of the adapter, built in.

    Each is `{name, source, path, words, examples, pooling, provenance, steered_layers, base, layers, hidden_size,
    fingerprint, statistics}`; of a built-in list, which belongs to no base, only name, source and words are not null.

    Raises:
        ConfigError: see `check_folder`.
        ModelError: a file that is no attribute file.
    """
    check_folder(folder)
    rows: list[dict[str, Any]] = []
    if folder is not None:
        rows += _of_files(_single(folder), "folder")
    if adapter is not None:
        trained = adapter / TRAINED_FILE
        rows += _of_files([*_single(adapter), *([trained] if path_exists(trained) else [])], "adapter")
    unknown = (
        "path",
        "examples",
        "pooling",
        "provenance",
        "steered_layers",
        "base",
        "layers",
        "hidden_size",
        "fingerprint",
    )
    nothing = dict.fromkeys(unknown)
    for name, words in built_in().items():
        rows.append({"name": name, "source": "built-in", "words": words, **nothing, "statistics": None})
    return rows


def _single(folder: Path) -> list[Path]:
    """Files of one attribute each, as attr-build writes them."""
    return sorted(path for path in folder.glob("*.safetensors") if path.stem not in OTHER_FILES)


def _of_files(paths: list[Path], source: str) -> Iterator[dict[str, Any]]:

    for path in paths:
        header = read_header(path)
        for name, words in header.attributes.items():
            known: Mapping[str, Any] = header.details.get(name, {})
            yield {
                "name": name,
                "source": source,
                "words": words,
                "path": str(path),
                "examples": known.get("examples"),
                "pooling": known.get("pooling", "mean"),
                "provenance": known.get("provenance", {}),
                "steered_layers": known.get("steered_layers"),
                "base": known.get("base"),
                "layers": len(header.layers),
                "hidden_size": header.fingerprint["hidden_size"],
                "fingerprint": header.fingerprint,
                "statistics": {key: known.get(key) for key in ("difference", "residual")},
            }
