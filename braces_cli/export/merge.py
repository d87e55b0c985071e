"""Merge an adapter into a plain checkpoint that loads without braces, and prove it before anyone sees it.

How it is done is decided in `planner`, written in `checkpoint_writer`, proved in `verification`. Here is the order:
plan, reference logits, new neurons, write into a folder beside the output, let go of the base, prove, rename.
"""

from __future__ import annotations

import gc
import logging
import os
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

from msgspec import Meta

from braces_cli.core.adapter.model import base_name
from braces_cli.core.attributes.hooks import steered, steering_vectors
from braces_cli.core.errors import ModelError
from braces_cli.core.files import path_exists, user_path, write_json, write_text
from braces_cli.core.models.ffn import find_ffns
from braces_cli.core.models.load import load_shape
from braces_cli.core.progress import Report, silent
from braces_cli.core.schema import Count, Kind, Name, read
from braces_cli.core.schema import check as check_document
from braces_cli.core.versions import versions
from braces_cli.export.cards import card
from braces_cli.export.checkpoint import check_output, copy_companions, new_folder, new_neurons, write_checkpoint
from braces_cli.export.form import Plan, expected_form, observed_form
from braces_cli.export.planner import plain_ffns, plan
from braces_cli.export.request import Request, inputs, open_bare, probe_tokens, sources, steering
from braces_cli.export.verify import Reference, figures, reference, verify_export

logger = logging.getLogger("braces")

RECORD_FILE = "braces_merge.json"
FORMAT_VERSION = 1


def merge(request: Request, output: Path, overwrite: bool = False, report: Report = silent) -> dict[str, Any]:
    """Write the merged checkpoint, proved, into `output`; returns what `braces merge` prints.

    Raises:
        ConfigError: the output folder is not empty, or is or lies in one of the inputs.
        ModelError: base and adapter do not fit, cannot be merged exactly, or the proof fails; nothing is left behind.
        BracesError: the disk is full.
    """
    check_output(output, overwrite, inputs(request))
    with new_folder(output, overwrite) as folder:
        facts, expected = _write(request, folder, report)
        # The base is gone from memory: the proof loads the merged model in a process of its own.
        gc.collect()
        report("proving", 0, 1)
        proof = verify_export(folder, expected)
        report("proving", 1, 1)
        result = {**facts, **figures(proof)}
        record = {"format_version": FORMAT_VERSION, **result, **_places(request), "versions": versions()}
        write_json(folder / RECORD_FILE, record)
        write_text(folder / "README.md", card(result))
    return {"output_dir": str(output), **result}


def _places(request: Request) -> dict[str, Any]:
    """Local inputs by their absolute paths, so that a check finds them from every working directory."""
    stored, folder = request.stored, request.attributes_dir
    local = user_path(stored.name).exists()
    return {
        "adapter": str(stored.folder) if local else stored.name,
        "attributes_dir": None if folder is None else str(folder.resolve()),
    }


class MergeRecord(TypedDict, total=False):
    """What a later check reads of `braces_merge.json`."""

    model: Name
    revision: Name | None
    adapter: Name
    attributes_dir: Name | None
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"]
    attributes: dict[Annotated[str, Meta(pattern=r"^\w[\w.-]*\Z")], float]
    layers: Annotated[str, Meta(pattern=r"^[\d, -]+\Z")] | None
    architecture: str
    neurons_added: Count
    case: str


_ANY_RECORD = Kind(dict[str, Any], ModelError, "The file is damaged; merge again.", "record of a merge")
_RECORD = Kind(MergeRecord, ModelError, _ANY_RECORD.hint)


def check(request: Request, folder: Path) -> dict[str, Any]:
    """Prove once more that `folder` is base and adapter in one; writes nothing.

    Raises:
        ModelError: it is not.
    """
    record = read_record(folder)
    session = open_bare(request)
    terms, layers = steering(session, request)
    session.add_adapter(request.stored)
    expected = reference(session, terms, layers)
    del session
    gc.collect()
    proof = verify_export(folder, expected)
    kept = ("architecture", "neurons_added", "case", "dtype")
    facts = {key: record[key] for key in kept if key in record}
    return {"output_dir": str(folder), **facts, **sources(request), **figures(proof)}


def describe(request: Request) -> dict[str, Any]:
    """What a merge would do, from sizes alone; loads no weights.

    Raises:
        ModelError: base or adapter cannot be reached, or there is no exact way.
    """
    config = request.stored.config
    name = base_name(request.model, request.adapter)
    options = request.options
    revision = options.revision or (config.revision if request.model is None else None)
    model = load_shape(name, revision=revision, trust_remote_code=options.trust_remote_code)
    ffns = plain_ffns(model, find_ffns(model))
    merge_plan = plan(
        model, ffns, expected_form(ffns[0]), config.r, request.pad_to_multiple_of, bool(request.attributes)
    )
    total = sum(shape.numel() for shape in merge_plan.shapes.values())
    return _plan_facts(merge_plan) | {"trainable_parameters": 0, "total_parameters": total}


def read_record(folder: Path) -> dict[str, Any]:
    """What `merge` noted in the folder; empty where there is no note.

    Raises:
        ModelError: no checkpoint, or a damaged note.
    """
    if not os.path.isfile(folder / "config.json"):  # pathlib's would raise where the name is too long
        raise ModelError("no merged checkpoint here", where=str(folder), hint="Give a folder that braces merge wrote.")
    path = folder / RECORD_FILE
    if not path_exists(path):
        return {}
    record = read(_ANY_RECORD, path)
    check_document(_RECORD, record, str(path))
    return record


def _write(request: Request, folder: Path, report: Report) -> tuple[dict[str, Any], Reference]:
    """Everything that needs the base in memory; it is let go of on return."""
    report("loading", 0, 1)
    session = open_bare(request)
    model = session.base.model
    ffns = plain_ffns(model, session.ffns)
    form = observed_form(model, ffns, probe_tokens(session))
    terms, layers = steering(session, request)
    steers = any(s for _, s in terms)
    merge_plan = plan(model, ffns, form, request.stored.config.r, request.pad_to_multiple_of, steers)
    adapter = session.add_adapter(request.stored)
    report("loading", 1, 1)
    expected = reference(session, terms, layers)
    with steered(session, terms, layers):
        neurons = new_neurons(adapter, merge_plan, steering_vectors(session, terms, layers))
    adapter.detach()
    merge_plan.config.dtype = model.dtype
    write_checkpoint(folder, model, merge_plan, neurons, [ffn.layer for ffn in ffns], report)
    assert session.base.checkpoint is not None
    copy_companions(session.base.checkpoint, folder, session.base.tokenizer)
    facts = _plan_facts(merge_plan) | {"dtype": str(model.dtype).removeprefix("torch.")}
    return facts | sources(request) | {"model": session.base.name, "revision": session.base.revision}, expected


def _plan_facts(merge_plan: Plan) -> dict[str, Any]:
    return {
        "architecture": merge_plan.architecture,
        "case": merge_plan.case,
        "neurons_added": merge_plan.wider - merge_plan.width,
        "width": merge_plan.wider,
    }
