"""Headers of attribute files, and the list of all attributes that they hold. No torch here."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypedDict

from braces_cli.core.attributes.words import OTHER_FILES, built_in
from braces_cli.core.errors import ConfigError, ModelError
from braces_cli.core.files import file_hash, path_exists
from braces_cli.core.models.identity import Sizes
from braces_cli.core.schema import Count, Kind, Name, check, cut, parse, read_metadata

FORMAT_VERSION = "1"
# Attributes that an adapter was trained with, in the adapter's folder.
TRAINED_FILE = "attributes.safetensors"
_JSON_KEYS = ("attributes", "layers", "sizes", "details")
_UNKNOWN = dict.fromkeys(("examples", "pooling", "provenance", "steered_layers", "base", "layers", "hidden_size"))
_HINT = "Give --attributes the folder that `braces attr-build` wrote."


class Details(TypedDict, total=False):
    """Properties of an attribute that are not tensors or words; see `core.attributes.vector`."""

    base: Name | None
    pooling: Literal["mean", "last", "max"]
    examples: Count
    steered_layers: list[Count] | None
    provenance: dict[str, Any]


@dataclass(frozen=True)
class AttributeHeader:
    """Metadata of an attribute file; each value is JSON.

    Attributes:
        attributes: name -> words that the attribute was built from.
        layers: decoder layer of each row of the tensors.
        sizes: of the base.
        details: by name.
    """

    attributes: dict[Name, list[str]]
    layers: list[Count]
    sizes: Sizes
    details: dict[str, Details] = field(default_factory=dict)


HEADER = Kind(AttributeHeader, ModelError, "Build it again: attr-build.", "file of attributes", closed=True)


def read_header(path: Path) -> AttributeHeader:
    """Read the metadata of an attribute file.

    Raises:
        ModelError: a file that is damaged, is not an attribute file, or has another format version.
    """
    metadata = read_metadata(path, HEADER)
    missing = {"attributes", "layers", "sizes"} - set(metadata)
    if missing:
        hint = "Remove it from the folder, or build it again: attr-build."
        raise ModelError(f"not an attribute file: no {', '.join(sorted(missing))}", where=str(path), hint=hint)
    version = metadata.get("format_version")
    if version != FORMAT_VERSION:
        what = f"format version {cut(version)}, this version of braces reads {FORMAT_VERSION}"
        raise ModelError(what, where=str(path), hint="Update braces, or build it again: attr-build.")
    text = Kind(object, ModelError, HEADER.hint)
    values = {key: parse(text, metadata[key], f"{path}, {key}") for key in _JSON_KEYS if key in metadata}
    header = check(HEADER, values, str(path))
    layers = header.sizes["layers"]
    if len(header.layers) != layers or header.layers != sorted(set(header.layers)):
        what = f"`layers` must name {layers} layers, each once and in order"
        raise ModelError(what, where=str(path), hint=HEADER.hint)
    return header


def check_attributes(folder: Path | None, *, can_be_empty: bool = False) -> None:
    """Refuse an `--attributes` folder that cannot be read or has no attribute files.

    A built-in list must not replace its attributes silently.
    """
    if folder is None:
        return
    try:
        names = [path.name for path in folder.iterdir()]
    except OSError as error:
        what = f"cannot read this folder: {error.strerror}" if path_exists(folder) else "no such folder"
        raise ConfigError(what, where=str(folder), hint=_HINT) from error
    if not can_be_empty and not any(name.endswith(".safetensors") for name in names):
        raise ConfigError("no attribute file in this folder", where=str(folder), hint=_HINT)


def attribute_hashes(names: Iterable[str], folders: Iterable[Path | None]) -> list[str]:
    """Return the SHA-256 of each file that one of the attributes can come from.

    Raises:
        ModelError: a file that cannot be read.
    """
    files = [TRAINED_FILE, *(f"{name}.safetensors" for name in names)]
    paths = [folder / file for folder in folders if folder is not None for file in files]
    return [file_hash(path, ModelError) for path in paths if path_exists(path)]


def list_attributes(folder: Path | None, adapter: Path | None) -> list[dict[str, Any]]:
    """Return the attributes of `folder`, of the adapter, and the built-in ones, in the order of `find_attribute`.

    Each is `{name, source, path, words, examples, pooling, provenance, steered_layers, base, layers,
    hidden_size}`. A built-in list belongs to no base: only name, source and words are not null.

    Raises:
        ConfigError: a folder that cannot be read.
        ModelError: a file that is not an attribute file.
    """
    check_attributes(folder, can_be_empty=True)
    sources = [(path, "folder") for path in _attribute_files(folder)]
    sources += [(path, "adapter") for path in _attribute_files(adapter)]
    if adapter is not None and path_exists(adapter / TRAINED_FILE):
        sources.append((adapter / TRAINED_FILE, "adapter"))
    rows: list[dict[str, Any]] = []
    for path, source in sources:
        header = read_header(path)
        for name, words in header.attributes.items():
            row = {"name": name, "source": source, "words": words, "path": str(path), **_UNKNOWN, "pooling": "mean"}
            row |= {"provenance": {}, "layers": len(header.layers), "hidden_size": header.sizes["hidden_size"]}
            rows.append(row | header.details.get(name, {}))
    for name, words in built_in().items():
        rows.append({"name": name, "source": "built-in", "words": words, "path": None, **_UNKNOWN})
    return rows


def _attribute_files(folder: Path | None) -> list[Path]:
    """Return the files of one attribute each in a folder."""
    found = [] if folder is None else folder.glob("*.safetensors")
    return sorted(path for path in found if path.stem not in OTHER_FILES)
