"""Merge an adapter into a plain checkpoint that loads without braces, and prove it before anyone sees it.

`planner` decides how, `checkpoint_writer` writes, `verification` proves. This module sets the order:
plan, compute reference logits, make new neurons, write into a folder beside the output, free the base, verify, rename.
"""

from __future__ import annotations

import gc
import json
import logging
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from braces_cli.core.attributes.attribute import find_attribute
from braces_cli.core.attributes.intervention import steered
from braces_cli.core.method.adapter_files import StoredAdapter
from braces_cli.core.models.ffn import find_ffns
from braces_cli.core.models.layer_ranges import chosen_layers
from braces_cli.core.models.load_options import LoadOptions
from braces_cli.core.models.loading import load_shape
from braces_cli.core.models.tokenization import encode
from braces_cli.core.session import Session, attached, base_name, open_session
from braces_cli.core.utils.atomic_files import check_output_folder, file_hint, umask, write_json, write_text
from braces_cli.core.utils.errors import BracesError, ConfigError, ModelError
from braces_cli.core.utils.progress import Report, silent
from braces_cli.core.utils.versions import versions
from braces_cli.export.checkpoint_writer import copy_companions, new_neurons, write_checkpoint
from braces_cli.export.ffn_form import expected_form, observed_form, refuse
from braces_cli.export.model_card import card
from braces_cli.export.plan import Plan
from braces_cli.export.planner import plain_ffns, plan
from braces_cli.export.verification import Proof, Reference, prove, reference

logger = logging.getLogger("braces")

RECORD_FILE = "braces_merge.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Request:
    """What is to be merged.

    Attributes:
        model: the base, None for the adapter's own.
        adapter: its files, read and checked.
        options: how to load the base; its dtype is the one that is written.
        attributes: strength s of each attribute that is merged in as a constant.
        attributes_dir: where they are looked up first.
        layers: decoder layers that are steered, as `--layers` says; None is all.
        pad_to_multiple_of: what the width of the FFN is rounded up to a multiple of.
    """

    model: str | None
    adapter: StoredAdapter
    options: LoadOptions
    attributes: dict[str, float] = field(default_factory=dict)
    attributes_dir: Path | None = None
    layers: str | None = None
    pad_to_multiple_of: int = 64


def merge(request: Request, output: Path, overwrite: bool = False, report: Report = silent) -> dict[str, Any]:
    """Write the merged checkpoint, proved, into `output`; returns what `braces merge` prints.

    Raises:
        ConfigError: the output folder is not empty, or is or lies in one of the inputs.
        ModelError: base and adapter do not fit, cannot be merged exactly, or the proof fails; nothing is left behind.
        BracesError: the disk is full.
    """
    check_output_folder(output, overwrite)
    source = _inputs(request)
    for path in source:
        _check_apart(output, path)
    with _beside(output, overwrite) as folder:
        facts, expected = _write(request, folder, report)
        # The base is gone from memory: the proof loads the merged model in a process of its own.
        gc.collect()
        report("proving", 0, 1)
        proof = prove(folder, expected)
        report("proving", 1, 1)
        result = {**facts, **_figures(proof)}
        write_json(folder / RECORD_FILE, {"format_version": FORMAT_VERSION, **result, "versions": versions()})
        write_text(folder / "README.md", card(result))
    return {"output_dir": str(output), **result}


def check(request: Request, folder: Path) -> dict[str, Any]:
    """Prove once more that `folder` is base and adapter in one; writes nothing.

    Raises:
        ModelError: it is not.
    """
    record = read_record(folder)
    session = _open(request)
    terms, layers = _steering(session, request)
    session.add_adapter(request.adapter)
    expected = reference(session, terms, layers)
    del session
    gc.collect()
    proof = prove(folder, expected)
    kept = ("architecture", "neurons_added", "case", "dtype")
    facts = {key: record[key] for key in kept if key in record}
    return {"output_dir": str(folder), **facts, **_sources(request), **_figures(proof)}


def describe(request: Request) -> dict[str, Any]:
    """What a merge would do, from sizes alone; loads no weights.

    Raises:
        ModelError: base or adapter cannot be reached, or there is no exact way.
    """
    config = request.adapter.config
    name = base_name(request.model, request.adapter)
    options = request.options
    revision = options.revision or (config.revision if request.model is None else None)
    model = load_shape(name, revision=revision, trust_remote_code=options.trust_remote_code)
    ffns = plain_ffns(model, find_ffns(model))
    made = plan(model, ffns, expected_form(ffns[0]), config.r, request.pad_to_multiple_of, bool(request.attributes))
    total = sum(shape.numel() for shape in made.shapes.values())
    return _plan_facts(made) | {"trainable_parameters": 0, "total_parameters": total}


def read_record(folder: Path) -> dict[str, Any]:
    """What `merge` noted in the folder; empty where there is no note.

    Raises:
        ModelError: no checkpoint, or a damaged note.
    """
    if not (folder / "config.json").is_file():
        raise ModelError("no merged checkpoint here", where=str(folder), hint="Give a folder that braces merge wrote.")
    path = folder / RECORD_FILE
    if not path.is_file():
        return {}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"not JSON: {error}", where=str(path), hint="The file is damaged; merge again.") from error
    if not isinstance(record, dict):
        raise ModelError("not a JSON object", where=str(path), hint="The file is damaged; merge again.")
    return record


def _inputs(request: Request) -> list[Path]:
    """Folders that are read, and must be neither written into nor replaced."""
    name = Path(base_name(request.model, request.adapter)).expanduser()
    folders = [request.adapter.folder, *([name] if name.is_dir() else [])]
    return folders + ([request.attributes_dir] if request.attributes_dir is not None else [])


def _check_apart(output: Path, source: Path) -> None:
    inside, outside = output.resolve(), source.resolve()
    if inside == outside or outside in inside.parents or inside in outside.parents:
        hint = "Give an --output-dir that neither lies in an input nor holds one."
        raise ConfigError(f"the output folder overlaps the input {source}", where=str(output), hint=hint)


def _open(request: Request) -> Session:
    """The base, bare, after the adapter was found to fit it."""
    if request.options.quantize is not None:
        raise ConfigError("a merge is written from whole weights", where="--quantize", hint="Leave --quantize out.")
    session = open_session(request.model, request.adapter, request.options)
    session.remove_adapter()
    if any(parameter.is_meta for parameter in session.base.model.parameters()):
        hint = "Leave --device-map out; a merge holds the base in memory once, a GPU is not needed."
        raise ConfigError("parts of the base are not in memory", where="--device-map", hint=hint)
    if session.base.checkpoint is None:
        raise refuse(session.base.model, "it has no checkpoint folder, from which to take its tokenizer")
    return session


def _ids(session: Session) -> torch.Tensor:
    """A few tokens to watch the FFNs with, (1, tokens)."""
    ids = encode(session.base.tokenizer, "The town has a library, a school and two small shops.").ids
    return torch.tensor([ids], device=session.base.model.get_input_embeddings().weight.device)


def _steering(session: Session, request: Request) -> tuple[list[Any], Collection[int] | None]:
    terms = []
    if request.attributes:
        wanted = request.attributes.items()
        with attached(session, request.adapter):  # whose folder is looked into, and who may have been trained with them
            terms = [(find_attribute(session, name, request.attributes_dir), s) for name, s in wanted]
    return terms, chosen_layers(session.base.model, request.layers)


def _write(request: Request, folder: Path, report: Report) -> tuple[dict[str, Any], Reference]:
    """Everything that needs the base in memory; it is let go of on return."""
    report("loading", 0, 1)
    session = _open(request)
    model = session.base.model
    ffns = plain_ffns(model, session.ffns)
    form = observed_form(model, ffns, _ids(session))
    terms, layers = _steering(session, request)
    steers = any(s for _, s in terms)
    made = plan(model, ffns, form, request.adapter.config.r, request.pad_to_multiple_of, steers)
    adapter = session.add_adapter(request.adapter)
    report("loading", 1, 1)
    expected = reference(session, terms, layers)
    with steered(session, terms, layers):
        neurons = new_neurons(adapter, made)
    adapter.detach()
    made.config.dtype = model.dtype
    write_checkpoint(folder, model, made, neurons, [ffn.layer for ffn in ffns], report)
    assert session.base.checkpoint is not None
    copy_companions(session.base.checkpoint, folder)
    facts = _plan_facts(made) | {"dtype": str(model.dtype).removeprefix("torch.")}
    return facts | _sources(request) | {"model": session.base.name, "revision": session.base.revision}, expected


def _plan_facts(made: Plan) -> dict[str, Any]:
    return {
        "architecture": made.architecture,
        "case": made.case,
        "neurons_added": made.wider - made.width,
        "width": made.wider,
    }


def _sources(request: Request) -> dict[str, Any]:
    return {
        "model": base_name(request.model, request.adapter),
        "adapter": request.adapter.name,
        "attributes": request.attributes,
        "layers": request.layers,
    }


def _figures(proof: Proof) -> dict[str, Any]:
    return {
        "max_logit_difference": proof.difference,
        "relative_difference": proof.relative,
        "rounding": proof.reference.rounding,
        "adapter_effect": proof.reference.effect,
        "effect_missing": proof.missing,
        "probes": len(proof.reference.ids),
    }


@contextmanager
def _beside(output: Path, overwrite: bool) -> Iterator[Path]:
    """A new folder beside `output` that takes its name when all has gone well, and is gone otherwise."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    except OSError as error:
        raise BracesError(f"cannot write: {error.strerror}", where=str(output), hint=file_hint(error)) from error
    try:
        yield folder
        # mkdtemp makes folders for the owner alone; give what a plain mkdir() would have given.
        folder.chmod(0o777 & ~umask())
        _rename(folder, output, overwrite)
    except OSError as error:
        raise BracesError(
            f"cannot write: {error.strerror or error}", where=str(output), hint=file_hint(error)
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _rename(folder: Path, output: Path, overwrite: bool) -> None:
    if not output.exists() or not any(output.iterdir()):
        folder.replace(output)
        return
    assert overwrite
    old = Path(tempfile.mkdtemp(prefix=f".{output.name}.old.", dir=output.parent))
    output.replace(old)
    try:
        folder.replace(output)
    except OSError:
        old.replace(output)
        raise
    shutil.rmtree(old)
