"""Which attributes there are and what they were built from, read from the headers of their files: no torch here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from braces_cli.core.attributes.word_lists import built_in
from braces_cli.core.utils.errors import ConfigError, ModelError
from braces_cli.core.utils.paths import is_there

# Attributes that an adapter was trained with, in its folder.
TRAINED_FILE = "attributes.safetensors"
# Files of an adapter's folder that are no attribute.
OTHER_FILES = {"attributes", "adapter_model", "model"}
_HEADER_LIMIT = 1 << 30


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
        what = "no such folder" if not is_there(folder) else f"cannot read this folder: {error.strerror}"
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


def list_attributes(folder: Path | None, adapter: Path | None) -> list[dict[str, Any]]:
    """Attributes in the order in which `--attribute` looks for them: of `folder`, of the adapter, built in.

    Each is `{name, source, path, words, examples, pooling, made, push_layers, base, layers, hidden_size, fingerprint,
    statistics}`; of a built-in list, which belongs to no base, only name, source and words are not null.

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
        rows += _of_files([*_single(adapter), *([trained] if is_there(trained) else [])], "adapter")
    unknown = ("path", "examples", "pooling", "made", "push_layers", "base", "layers", "hidden_size", "fingerprint")
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
        fingerprint, layers = json.loads(header["fingerprint"]), json.loads(header["layers"])
        details = json.loads(header.get("details", "{}"))
        for name, words in json.loads(header["attributes"]).items():
            known = details.get(name, {})
            yield {
                "name": name,
                "source": source,
                "words": words,
                "path": str(path),
                "examples": known.get("examples"),
                "pooling": known.get("pooling", "mean"),
                "made": known.get("made", {}),
                "push_layers": known.get("push_layers"),
                "base": known.get("base"),
                "layers": len(layers),
                "hidden_size": fingerprint["hidden_size"],
                "fingerprint": fingerprint,
                "statistics": {key: known.get(key) for key in ("difference", "residual")},
            }


def read_header(path: Path) -> dict[str, str]:
    """The metadata of an attribute file.

    Raises:
        ModelError: it is none.
    """
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            metadata = json.loads(file.read(size)).get("__metadata__", {}) if size < _HEADER_LIMIT else {}
        missing = {"attributes", "fingerprint", "layers"} - set(metadata)
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(
            f"not an attribute file: {error}", where=str(path), hint="Build it again: attr-build."
        ) from error
    if missing:
        hint = "Remove it from the folder, or build it again: attr-build."
        raise ModelError(f"not an attribute file: no {', '.join(sorted(missing))}", where=str(path), hint=hint)
    header: dict[str, str] = metadata
    return header
