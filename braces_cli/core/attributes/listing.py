"""Which attributes there are and what they were built from, read from the headers of their files: no torch here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from braces_cli.core.attributes.word_lists import OTHER_FILES, built_in
from braces_cli.core.utils.errors import ConfigError, ModelError
from braces_cli.core.utils.file_hashes import file_hash
from braces_cli.core.utils.paths import path_exists

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
    from braces_cli.core.attributes.attribute_header import (
        read_header,  # msgspec, which an option's check does not need
    )

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
