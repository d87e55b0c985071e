"""Run an export: check, open the base, write, verify, record, model card, rename; the same steps for every kind.

A kind of export is a subclass of `Export` that writes its files, with a card template `assets/export/NAME_card.md.j2`.
The output is written next to its destination, verified there, and renamed: it is complete when it appears.
"""

from __future__ import annotations

import errno
import gc
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Final

import torch

from braces_cli.core.adapter.files import StoredAdapter
from braces_cli.core.adapter.model import Session, base_name, open_session
from braces_cli.core.attributes.lookup import find_attribute
from braces_cli.core.attributes.vector import Attribute
from braces_cli.core.errors import BracesError, ConfigError, ModelError
from braces_cli.core.files import (
    check_output_folder,
    file_hint,
    output_lock,
    partial_path,
    user_path,
    versions,
    write_json,
    write_text,
)
from braces_cli.core.models.ffn import chosen_layers
from braces_cli.core.models.load import load_shape
from braces_cli.core.models.tokenize import encode
from braces_cli.core.options import LoadOptions
from braces_cli.core.progress import Report, silent
from braces_cli.core.schema import WRITTEN, read
from braces_cli.export.cards import card
from braces_cli.export.verify import Reference, reference, verify_export

FORMAT_VERSION: Final = 1
# Files that make a folder a model or an adapter.
_LOADED_BY = ("config.json", "adapter_config.json")
# Files next to the weights that transformers loads by name: generation settings and tokenizer.
_WITH_WEIGHTS = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "chat_template.jinja",
    "chat_template.json", "additional_chat_templates",
)  # fmt: skip
# Everything that programs load from an exported folder by name: of an earlier export it is removed.
_LOADED = (
    *_LOADED_BY, *_WITH_WEIGHTS, "model.safetensors", "model-*.safetensors", "model.safetensors.index.json",
    "adapter_model.safetensors", "modeling_braces.py", "braces_*.json",
)  # fmt: skip
# Files of the base that are copied: whatever a tokenizer may consist of, generation settings and licence.
_COPIED = (
    *_WITH_WEIGHTS, "tokenizer*", "vocab*", "*.tiktoken", "*.model", "spiece*", "chat_template*", "LICENSE*", "NOTICE*",
)  # fmt: skip


@dataclass(frozen=True)
class Request:
    """Base, adapter and attributes of an export.

    Attributes:
        model: the base; None for the adapter's.
        adapter: None if the base or an attribute alone is exported.
        options: how to load the base; its dtype is that of the output.
        attributes: strength s of each attribute that is exported as a constant.
        attributes_dir: searched first for attributes.
        layers: decoder layers that are steered, as in `--layers`; None for all.
    """

    model: str | None
    adapter: StoredAdapter | None
    options: LoadOptions
    attributes: dict[str, float] = field(default_factory=dict)
    attributes_dir: Path | None = None
    layers: str | None = None

    @property
    def steers(self) -> bool:
        """An attribute has a strength other than 0."""
        return any(self.attributes.values())

    def facts(self) -> dict[str, Any]:
        """Base, adapter and attributes as commands print and record them."""
        return {
            "model": base_name(self.model, self.adapter),
            "adapter": None if self.adapter is None else self.adapter.name,
            "attributes": self.attributes,
            "layers": self.layers,
        }


@dataclass(frozen=True)
class Export(ABC):
    """A kind of export."""

    # In the names of record and card template.
    name: ClassVar[str]
    # The output has a modelling file, which the verification may run.
    has_code: ClassVar[bool] = False

    request: Request

    def inputs(self) -> list[Path]:
        """Folders that are read; the output must not overlap them."""
        base = user_path(base_name(self.request.model, self.request.adapter))
        adapter = None if self.request.adapter is None else self.request.adapter.folder
        folders = (base, adapter, self.request.attributes_dir)
        return [folder for folder in folders if folder is not None and folder.is_dir()]

    @abstractmethod
    def write(self, opened: Opened, folder: Path, report: Report) -> tuple[dict[str, Any], dict[str, Any]]:
        """Write the export into the empty folder.

        Returns:
            Facts to print and record, and more entries of the record.

        Raises:
            ModelError: an exact export is not possible.
        """

    def describe(self) -> dict[str, Any]:
        """Facts known without the weights, for `--dry-run`."""
        return {}

    def verify(self, folder: Path, expected: Reference) -> dict[str, Any]:
        """Compare the export with the reference; returns what was measured."""
        return verify_export(folder, expected, self.has_code)


@dataclass(frozen=True)
class Opened:
    """An open base, with the request's adapter attached, and its attributes.

    Attributes:
        terms: attributes with their strengths.
        layers: decoder layers that are steered; None for all.
    """

    session: Session
    terms: list[tuple[Attribute, float]]
    layers: Collection[int] | None

    def reference(self) -> Reference:
        """Logits that the export must have."""
        return reference(self.session, self.terms, self.layers)


def run(export: Export, output: Path, overwrite: bool = False, report: Report = silent) -> dict[str, Any]:
    """Write an export, verified, into `output`; returns what the command prints.

    Raises:
        ConfigError: the output folder is not empty, or overlaps an input.
        ModelError: base and adapter do not fit, cannot be exported exactly, or the verification fails.
        BracesError: the disk is full.
    """
    check_output(output, overwrite, export.inputs())
    with new_folder(output, overwrite) as folder:
        report("loading", 0, 1)
        opened = open_in_memory(export.request)
        report("loading", 1, 1)
        expected = opened.reference()
        base = opened.session.base
        facts = {**export.request.facts(), "model": base.name, "revision": base.revision}
        facts["dtype"] = str(base.model.dtype).removeprefix("torch.")
        written, entries = export.write(opened, folder, report)
        # The verification loads the export in another process: free the base before.
        del opened, base
        gc.collect()
        report("verifying", 0, 1)
        result = facts | written | export.verify(folder, expected)
        report("verifying", 1, 1)
        record = {"format_version": FORMAT_VERSION, **result, **entries, "versions": versions()}
        write_json(folder / f"braces_{export.name}.json", record)
        write_text(folder / "README.md", card(export.name, result))
    return {"output_dir": str(output), **result}


def open_request(request: Request) -> Opened:
    """Open the base with adapter and attributes.

    Raises:
        ConfigError: an unknown attribute, or a layer to steer that the adapter does not have.
        ModelError: base or adapter cannot be loaded, or they do not fit.
    """
    session = open_session(request.model, request.adapter, request.options)
    layers = chosen_layers(session.base.model, request.layers)
    terms = [(find_attribute(session, name, request.attributes_dir), s) for name, s in request.attributes.items()]
    if session.config is not None and any(attribute.direction is None for attribute, _ in terms):
        missing = sorted(set(layers or ()) - set(session.config.layers))
        if missing:
            hint = f"It has layers {', '.join(map(str, session.config.layers))}."
            raise ConfigError(f"the adapter has no layer {missing[0]} to steer", where="--layers", hint=hint)
    return Opened(session, terms, layers)


def open_in_memory(request: Request) -> Opened:
    """Open the request with all weights in memory, unquantised, and with a checkpoint folder.

    Raises:
        ConfigError: an option of loading is not possible here; or see `open_request`.
        ModelError: the base has no checkpoint folder, or see `open_request` and `companions`.
    """
    if request.options.quantize is not None:
        raise ConfigError("a quantised base cannot be exported", where="--quantize", hint="Leave --quantize out.")
    opened = open_request(request)
    base = opened.session.base
    if any(parameter.is_meta for parameter in base.model.parameters()):
        hint = "Leave --device-map out; an export holds the base in memory once, a GPU is not needed."
        raise ConfigError("parts of the base are not in memory", where="--device-map", hint=hint)
    if base.checkpoint is None:
        raise ModelError("the base has no checkpoint folder with its tokenizer", where=base.name, hint="Save it first.")
    companions(base.checkpoint)
    return opened


def base_shape(request: Request) -> Any:
    """Return the request's base without weights."""
    options, adapter = request.options, request.adapter
    stored = adapter.config.revision if adapter is not None and request.model is None else None
    name = base_name(request.model, adapter)
    return load_shape(name, revision=options.revision or stored, trust_remote_code=options.trust_remote_code)


def probe_tokens(session: Session) -> torch.Tensor:
    """Tokens for a forward pass that observes the FFNs, (1, tokens)."""
    ids = encode(session.base.tokenizer, "The town has a library, a school and two small shops.").ids
    return torch.tensor([ids], device=session.base.model.get_input_embeddings().weight.device)


def check_output(output: Path, overwrite: bool, inputs: Collection[Path]) -> None:
    """Refuse an output folder before the base is loaded.

    Raises:
        ConfigError: the folder is not empty, is or holds the working directory, or overlaps one of the inputs.
    """
    check_output_folder(output, overwrite, inputs=inputs)
    inside, here = output.resolve(), Path.cwd()
    if inside == here or inside in here.parents:
        hint = "Name a folder that is to be created."
        what = "the output folder cannot hold the working directory: a new folder may take its place"
        raise ConfigError(what, where=str(output), hint=hint)


@contextmanager
def new_folder(output: Path, overwrite: bool) -> Iterator[Path]:
    """Yield a new folder that is renamed to `output` at the end, and removed after an error.

    If `output` has content, files that no export writes stay.

    Raises:
        ConfigError: another command is writing there.
        BracesError: the disk is full or not writable.
    """
    path = Path(os.path.realpath(output))
    with output_lock(output):
        folder = None
        try:
            folder = partial_path(path)
            folder.mkdir()
            yield folder
            # Again: the folder may have been filled meanwhile.
            check_output_folder(path, overwrite)
            if path.exists() and any(path.iterdir()):
                _move_into(folder, path)
            else:
                folder.replace(path)
        except OSError as error:
            what = f"cannot write: {error.strerror or error}"
            raise BracesError(what, where=str(output), hint=file_hint(error)) from error
        finally:
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)


def _move_into(folder: Path, output: Path) -> None:
    """Move the files of `folder` into `output`, in place of those of an earlier export.

    The files that make the folder a model are removed first and moved last: after an interruption `output` is not a
    checkpoint of two halves.
    """
    new = {path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir()}
    for path in new:
        if (output / path).is_dir() and not (output / path).is_symlink():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(output / path))
    for path in sorted({path for pattern in _LOADED for path in output.glob(pattern)}):
        if path.is_symlink() or not path.is_dir():
            path.unlink()
        else:
            shutil.rmtree(path)
    for path in sorted(new, key=lambda path: (path.name in _LOADED_BY, path)):
        (output / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).replace(output / path)


def companions(source: Path) -> list[Path]:
    """Files and folders of a base that are copied with its weights.

    Raises:
        ModelError: one is a link out of the base's folder, whose target may be private.
    """
    found = sorted({path for pattern in _COPIED for path in source.glob(pattern)})
    root = Path(os.path.realpath(source))
    # In the hub's cache, the folders of revisions hold links to files next to them.
    root = next((folder for folder in root.parents if folder.name.startswith("models--")), root)
    for path in found:
        for file in (path, *sorted(path.rglob("*"))):
            target = Path(os.path.realpath(file))
            if root not in target.parents or not target.exists():
                hint = "Put a copy of the file in its place, or remove the link."
                raise ModelError("this link leads out of the model's folder", where=str(file), hint=hint)
    return found


def copy_companions(session: Session, folder: Path) -> None:
    """Copy tokenizer, chat template, generation settings and licence of the base.

    If the tokenizer's files name no class, transformers derives one from the model type, which may differ in `folder`:
    then the class of the base's tokenizer is added.

    Raises:
        BracesError: cannot be written.
    """
    assert session.base.checkpoint is not None
    for path in companions(session.base.checkpoint):
        if path.is_dir():
            shutil.copytree(path, folder / path.name)
        else:
            shutil.copyfile(path, folder / path.name)
    path, tokenizer = folder / "tokenizer_config.json", type(session.base.tokenizer)
    settings = read(WRITTEN, path) if path.is_file() else {}
    if not settings.get("tokenizer_class") and tokenizer.__module__.startswith("transformers."):
        write_json(path, settings | {"tokenizer_class": tokenizer.__name__})
