"""Run an export: check, open the base, write, verify, record, model card, rename; the same steps for every kind.

Each kind of export is a function that calls `run` with a function that writes its files. Its card is the template
`assets/export/NAME_card.md.j2`. The output is written next to its destination, verified there, and renamed: it is
complete when it appears.
"""

import gc
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch

from braces_cli.core import files
from braces_cli.core.adapter.files import StoredAdapter, adapter_hash
from braces_cli.core.adapter.model import Session, base_name, open_session
from braces_cli.core.attributes.hooks import erased_directions
from braces_cli.core.attributes.lookup import find_attribute
from braces_cli.core.attributes.vector import Attribute
from braces_cli.core.config import SETTINGS_FILE, write_settings
from braces_cli.core.errors import BracesError, ConfigError, ModelError
from braces_cli.core.models.ffn import chosen_layers
from braces_cli.core.models.hub import is_gguf, is_linked, known_license
from braces_cli.core.models.load import load_shape
from braces_cli.core.models.tokenize import encode
from braces_cli.core.options import LoadOptions
from braces_cli.core.progress import Report
from braces_cli.core.render import render
from braces_cli.core.schema import WRITTEN, read
from braces_cli.export.verify import Reference, reference

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
    """Base, adapter and attributes of an export, and its place.

    Attributes:
        model: the base; None for the adapter's.
        adapter: None if the base or an attribute alone is exported.
        options: how to load the base; its dtype is that of the output.
        output: folder to write, or file of a control vector.
        overwrite: the output may exist.
        attributes: strength s of each attribute that is exported as a constant.
        attributes_dir: searched first for attributes.
        layers: decoder layers that are steered, as in `--layers`; None for all.
        erase: attributes to erase.
    """

    model: str | None
    adapter: StoredAdapter | None
    options: LoadOptions
    output: Any = None
    overwrite: bool = False
    attributes: dict[str, float] = field(default_factory=dict)
    attributes_dir: Path | None = None
    layers: str | None = None
    erase: tuple[str, ...] = ()

    def facts(self) -> dict[str, Any]:
        """Base, adapter and attributes as commands print and record them."""
        return {
            "model": self.model,
            "adapter": None if self.adapter is None else self.adapter.name,
            "attributes": self.attributes,
            "layers": self.layers,
        }


@dataclass(frozen=True)
class Opened:
    """An open base, with the request's adapter attached, and its attributes.

    Attributes:
        terms: attributes with their strengths.
        layers: decoder layers that are steered; None for all.
        erase: decoder layer -> directions that are erased.
    """

    session: Session
    terms: list[tuple[Attribute, float]]
    layers: Collection[int] | None
    erase: dict[int, torch.Tensor]


# Writes an export into the empty folder; returns facts to print and record, and more entries of the record.
# Raises ModelError if an exact export is not possible.
Writer = Callable[[Opened, Path], tuple[dict[str, Any], dict[str, Any]]]
# Compares the export in a folder with the reference; returns what was measured.
Verifier = Callable[[Path, Reference], dict[str, Any]]


def run(
    name: str, request: Request, write: Writer, verify: Verifier, report: Report, inputs: Sequence[Path] = ()
) -> dict[str, Any]:
    """Write an export, verified, into the request's output; returns what the command prints.

    Args:
        name: kind of export, in the names of record and card template.
        inputs: more folders that are read; the output must not overlap them.

    Raises:
        ConfigError: the output folder is not empty, holds the working directory, or overlaps an input.
        ModelError: base and adapter do not fit, cannot be exported exactly, or the verification fails.
        BracesError: the disk is full.
    """
    output, overwrite = request.output, request.overwrite
    adapter = None if request.adapter is None else request.adapter.folder
    files.check_output_folder(output, overwrite)
    files.check_apart(output, base_name(request.model, request.adapter), adapter, request.attributes_dir, *inputs)
    if Path.cwd().is_relative_to(output.resolve()):
        hint = "Name a folder that is to be created."
        what = "the output folder cannot hold the working directory: a new folder may take its place"
        raise ConfigError(what, where=str(output), hint=hint)
    with new_folder(output, overwrite) as folder:
        report("loading", 0, 1)
        opened = open_request(request)
        report("loading", 1, 1)
        expected = reference(opened.session, opened.terms, opened.layers, opened.erase)
        base = opened.session.base
        digest = base.digest
        facts = request.facts() | {"model": base.name, "revision": base.revision}
        facts["dtype"] = str(base.model.dtype).removeprefix("torch.")
        written, entries = write(opened, folder)
        # The verification loads the export in another process: free the base before.
        del opened, base
        gc.collect()
        report("verifying", 0, 1)
        result = facts | written | verify(folder, expected)
        report("verifying", 1, 1)
        record = {"format_version": FORMAT_VERSION, **result, **entries, "versions": files.versions()}
        files.write_json(folder / f"braces_{name}.json", record)
        trained = None if adapter is None else adapter_hash(adapter)
        write_settings(folder / SETTINGS_FILE, request.options, base=digest, adapter=trained)
        files.write_text(folder / "README.md", card(name, result))
    return {"output_dir": str(output), **result}


def card(name: str, facts: dict[str, Any]) -> str:
    """README.md of an export of the kind `name` with the facts that its command prints."""
    base = facts["model"]
    more = {"name": Path(base).name, "base_model": base if is_linked(base) else "", "license": known_license(base)}
    steering = ", ".join(f"{attribute} at s = {s:g}" for attribute, s in facts["attributes"].items()) or "none"
    return render(f"export/{name}_card.md.j2", facts | more | {"steering": steering})


def open_request(request: Request, in_memory: bool = True) -> Opened:
    """Open the base with adapter and attributes.

    Args:
        in_memory: also check that the weights are in memory and unquantised.

    Raises:
        ConfigError: an unknown attribute, or an option of loading that is not possible here.
        ModelError: base or adapter cannot be loaded, or they do not fit.
    """
    if in_memory and request.options.quantize is not None:
        raise ConfigError("a quantised base cannot be exported", where="--quantize", hint="Leave --quantize out.")
    session = open_session(request.model, request.adapter, request.options)
    if in_memory and any(parameter.is_meta for parameter in session.base.model.parameters()):
        hint = "Leave --device-map out; an export holds the base in memory once, a GPU is not needed."
        raise ConfigError("parts of the base are not in memory", where="--device-map", hint=hint)
    layers = chosen_layers(session.base.model, request.layers)
    terms = [(find_attribute(session, name, request.attributes_dir), s) for name, s in request.attributes.items()]
    erased = [find_attribute(session, name, request.attributes_dir, for_steering=False) for name in request.erase]
    return Opened(session, terms, layers, erased_directions(session, erased, layers))


def base_shape(request: Request) -> Any:
    """Return the request's base without weights."""
    revision, adapter = request.options.revision, request.adapter
    if adapter is not None and request.model is None:
        revision = revision or adapter.config.revision
    name = base_name(request.model, adapter)
    return load_shape(name, revision=revision, trust_remote_code=request.options.trust_remote_code)


def probe_tokens(session: Session) -> torch.Tensor:
    """Tokens for a forward pass that observes the FFNs, (1, tokens)."""
    ids = encode(session.base.tokenizer, "The town has a library, a school and two small shops.").ids
    return torch.tensor([ids], device=session.base.model.get_input_embeddings().weight.device)


@contextmanager
def new_folder(output: Path, overwrite: bool) -> Iterator[Path]:
    """Yield a new folder that is renamed to `output` at the end, and removed after an error.

    If `output` has content, files that no export writes stay.

    Raises:
        ConfigError: another command is writing there.
        BracesError: the disk is full or not writable.
    """
    path = Path(os.path.realpath(output))
    with files.output_lock(output):
        folder = files.partial_path(path)
        try:
            folder.mkdir()
            yield folder
            # Again: the folder may have been filled meanwhile.
            files.check_output_folder(path, overwrite)
            if path.exists() and any(path.iterdir()):
                _move_into(folder, path)
            else:
                folder.replace(path)
        except OSError as error:
            what = f"cannot write: {error.strerror or error}"
            raise BracesError(what, where=str(output), hint=files.file_hint(error)) from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _move_into(folder: Path, output: Path) -> None:
    """Move the files of `folder` into `output`, in place of those of an earlier export.

    The files that make the folder a model are removed first and moved last: after an interruption `output` is not a
    checkpoint of two halves.
    """
    new = [path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir()]
    for path in new:
        if (output / path).is_dir() and not (output / path).is_symlink():
            raise IsADirectoryError(f"{output / path} is a folder")
    for path in sorted({path for pattern in _LOADED for path in output.glob(pattern)}):
        if path.is_symlink() or not path.is_dir():
            path.unlink()
        else:
            shutil.rmtree(path)
    for path in sorted(new, key=lambda path: (path.name in _LOADED_BY, path)):
        (output / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).replace(output / path)


def copy_companions(session: Session, folder: Path) -> None:
    """Copy tokenizer, chat template, generation settings and licence of the base.

    If the tokenizer's files name no class, transformers derives one from the model type, which may differ in `folder`:
    then the class of the base's tokenizer is added. Generation settings get the tokens that end a turn of the adapter.

    Raises:
        ModelError: a file is a link out of the base's folder, whose target may be private.
        BracesError: cannot be written.
    """
    base = session.base
    assert base.checkpoint is not None
    if is_gguf(base.name):
        base.tokenizer.save_pretrained(folder)
        base.model.generation_config.save_pretrained(folder)
        return
    root = Path(os.path.realpath(base.checkpoint))
    # In the hub's cache, the folders of revisions hold links to files next to them.
    root = next((parent for parent in root.parents if parent.name.startswith("models--")), root)
    for path in sorted({path for pattern in _COPIED for path in base.checkpoint.glob(pattern)}):
        for file in (path, *sorted(path.rglob("*"))):
            target = Path(os.path.realpath(file))
            if root not in target.parents or not target.exists():
                hint = "Put a copy of the file in its place, or remove the link."
                raise ModelError("this link leads out of the model's folder", where=str(file), hint=hint)
        if path.is_dir():
            shutil.copytree(path, folder / path.name)
        else:
            shutil.copyfile(path, folder / path.name)
    path, tokenizer = folder / "tokenizer_config.json", type(base.tokenizer)
    settings = read(WRITTEN, path) if path.is_file() else {}
    if not settings.get("tokenizer_class") and tokenizer.__module__.startswith("transformers."):
        files.write_json(path, settings | {"tokenizer_class": tokenizer.__name__})
    if session.config is not None and session.config.chat_template is not None:
        base.tokenizer.save_chat_templates(folder, {}, None, save_jinja_files=True)
    if session.turn_ends:
        path, generation = folder / "generation_config.json", base.model.generation_config
        settings = read(WRITTEN, path) if path.is_file() else generation.to_diff_dict()
        # Programs would replace the end tokens of a file that says that it is derived from `config.json`.
        settings.pop("_from_model_config", None)
        files.write_json(path, settings | {"eos_token_id": generation.eos_token_id})
