"""Write a plain checkpoint with additional neurons in its FFNs, and merge an adapter that way.

The base is in memory once. The written tensors are views of it, except the widened ones of the current file.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from msgspec import Meta
from torch import Tensor

from braces_cli.core.adapter.files import find_adapter
from braces_cli.core.adapter.model import Adapter
from braces_cli.core.attributes.hooks import layer_steering
from braces_cli.core.errors import BracesError, ModelError
from braces_cli.core.files import file_hint, path_exists, user_path, write_json
from braces_cli.core.models.ffn import FFN, MixtureFFN, find_ffns
from braces_cli.core.progress import Report, silent
from braces_cli.core.schema import WRITTEN, Count, Kind, Name, read
from braces_cli.export.plan import Plan, ffn_form, plan
from braces_cli.export.run import Export, Opened, Request, base_shape, copy_companions, open_request, probe_tokens
from braces_cli.export.verify import reference, verify_export

# Tensors are gathered in one file up to this size, which bounds the memory of widened tensors.
SHARD_BYTES = 1 << 29

# Decoder layer -> A (d_r, d), B (d, d_r) in float32 on the CPU.
SidePaths = dict[int, tuple[Tensor, Tensor]]
# Decoder layer -> part, as in `Role` -> weights of the n new neurons (n, d) or biases (n,) in float32 on the CPU, and
# what is added to the bias of `value` (d,). Missing parts and neurons are zero.
Neurons = dict[int, dict[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class MergeRecord:
    """Entries of `braces_merge.json` that `braces merge --check` reads."""

    model: Name
    adapter: Name
    attributes: dict[Annotated[str, Meta(pattern=r"^\w[\w.-]*\Z")], float]
    architecture: str
    neurons_added: Count
    case: str
    dtype: Literal["float32", "bfloat16", "float16", "float64"]
    revision: Name | None = None
    attributes_dir: Name | None = None
    layers: Annotated[str, Meta(pattern=r"^[\d, -]+\Z")] | None = None


_RECORD = Kind(MergeRecord, ModelError, "The file is damaged; merge again.")


@dataclass(frozen=True)
class MergeExport(Export):
    """Base and adapter as one plain checkpoint.

    Attributes:
        pad_to_multiple_of: the width of the FFN is rounded up to a multiple of this.
    """

    name = "merge"

    pad_to_multiple_of: int = 64

    def plan(
        self, model: Any, found: Sequence[FFN | MixtureFFN], ids: Tensor | None = None
    ) -> tuple[Plan, dict[str, Any]]:
        """Return the plan, and what is printed of it; without weights if `ids` is None."""
        assert self.request.adapter is not None
        ffns, form = ffn_form(model, found, ids)
        neurons = self.request.adapter.config.r * (1 if form.gated else 2)
        planned = plan(model, ffns, form, neurons, self.pad_to_multiple_of, self.request.steers)
        facts = {
            "architecture": planned.architecture,
            "case": planned.case,
            "neurons_added": planned.wider - planned.width,
            "width": planned.wider,
        }
        return planned, facts

    def write(self, opened: Opened, folder: Path, report: Report) -> tuple[dict[str, Any], dict[str, Any]]:
        session, model = opened.session, opened.session.base.model
        stored, attributes_dir = session.stored, self.request.attributes_dir
        assert session.adapter is not None
        assert stored is not None
        paths = side_paths(session.adapter)
        vectors = {each.layer: each.total[0] for each in layer_steering(session, opened.terms, opened.layers)}
        session.remove_adapter()
        planned, facts = self.plan(model, session.ffns, probe_tokens(session))
        write_checkpoint(folder, model, planned, new_neurons(planned, paths, vectors), report)
        copy_companions(session, folder)
        # Local inputs by absolute paths, so that `--check` finds them from every working directory.
        entries = {
            "adapter": str(stored.folder) if user_path(stored.name).exists() else stored.name,
            "attributes_dir": None if attributes_dir is None else str(attributes_dir.resolve()),
        }
        return facts, entries

    def describe(self) -> dict[str, Any]:
        shape = base_shape(self.request)
        planned, facts = self.plan(shape, find_ffns(shape))
        return facts | planned.size


def read_record(folder: Path) -> MergeRecord:
    """Return the record in a merged checkpoint.

    Raises:
        ModelError: not a checkpoint that `braces merge` wrote, or a damaged record.
    """
    path = folder / f"braces_{MergeExport.name}.json"
    if not path_exists(path):
        hint = "Give a folder that braces merge wrote."
        raise ModelError("no merged checkpoint here", where=str(folder), hint=hint)
    return read(_RECORD, path)


def check(request: Request, folder: Path) -> dict[str, Any]:
    """Verify again that `folder` is base and adapter in one; writes nothing.

    Args:
        request: its empty fields are those of the record.

    Raises:
        ModelError: it is not.
    """
    record, options = read_record(folder), request.options
    directory = None if record.attributes_dir is None else Path(record.attributes_dir)
    if options.dtype == "auto":
        options = replace(options, dtype=record.dtype)
    request = Request(
        model=request.model or record.model,
        adapter=request.adapter or find_adapter(record.adapter),
        options=replace(options, revision=options.revision or record.revision),
        attributes=request.attributes or record.attributes,
        attributes_dir=request.attributes_dir or directory,
        layers=request.layers or record.layers,
    )
    opened = open_request(request)
    expected = reference(opened.session, opened.terms, opened.layers)
    del opened
    gc.collect()
    measured = verify_export(folder, expected)
    facts = {name: getattr(record, name) for name in ("architecture", "neurons_added", "case", "dtype")}
    return {"output_dir": str(folder), **facts, **request.facts(), **measured}


def side_paths(adapter: Adapter) -> SidePaths:
    """The low-rank factors of an adapter; mixtures of experts are left out."""
    paths = {}
    for ffn, adapter_layer in adapter.adapted_ffns:
        if isinstance(ffn, FFN):
            with torch.no_grad():
                a, b = adapter_layer.factors(ffn.values(), torch.float32)
            paths[ffn.layer] = (a.cpu(), b.cpu())
    return paths


def new_neurons(planned: Plan, paths: SidePaths, vectors: Mapping[int, Tensor]) -> Neurons:
    """New neurons of each decoder layer with a side path or a constant vector.

    Args:
        vectors: added to the FFN output of a layer, (d,).
    """
    neurons: Neurons = {}
    c, activated = planned.gate
    for ffn in planned.ffns:
        parts = neurons[ffn.layer] = {}
        if ffn.layer in vectors:
            parts["value.bias"] = vectors[ffn.layer]
        if ffn.layer in paths:
            a, b = paths[ffn.layer]
            balance = _balance(a, b, ffn)
            # Powers of two, which do not round.
            rows, columns = a * balance.unsqueeze(1), (b / balance / activated).mT
            if planned.form.gated:
                parts |= {"gate.bias": torch.full((len(rows),), c), "up": rows, "value": columns}
            else:
                parts |= {"key": torch.cat([rows, -rows]), "value": torch.cat([columns, -columns])}
    return neurons


def _balance(a: Tensor, b: Tensor, ffn: FFN) -> Tensor:
    """Power of two for each neuron that makes its row and column equally large relative to the base's (d_r,).

    In a format with one scale for many weights, a neuron far larger or smaller than its neighbours costs digits.
    """
    values, key = ffn.values(), ffn.keys[-1]
    assert isinstance(values, Tensor)
    key_weight: Any = key.weight
    keys = key_weight if hasattr(key, "out_features") else key_weight.mT
    row, column = a.norm(dim=1) / _typical_norm(keys), b.norm(dim=0) / _typical_norm(values.mT)
    ratio = (column / row).clamp(min=1e-9, max=1e9)
    balance: Tensor = torch.exp2((ratio.log2() / 2).round())
    return balance


def _typical_norm(rows: Tensor) -> Tensor:
    """Median norm of a few hundred rows."""
    sample = rows.detach()[:: max(1, len(rows) // 256)].float()
    return sample.norm(dim=1).median().clamp(min=1e-12).cpu()


def write_checkpoint(
    folder: Path, model: torch.nn.Module, planned: Plan, neurons: Neurons, report: Report = silent
) -> None:
    """Write weights and config into `folder`.

    Args:
        model: the base, without an adapter.

    Raises:
        BracesError: the disk is full or not writable.
    """
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors = model.state_dict()
    planned.config.dtype = model.dtype
    written = {}
    for name, shape in planned.shapes.items():
        # A new bias has the dtype of its weight.
        source = planned.sources.get(name) or planned.sources[f"{name.rpartition('.')[0]}.weight"]
        written[name] = torch.empty(shape, dtype=tensors[source[0]].dtype, device="meta")
    split = split_torch_state_dict_into_shards(written, max_shard_size=SHARD_BYTES)
    mask = os.umask(0)  # can only be read by setting it
    os.umask(mask)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        for index, (file, names) in enumerate(split.filename_to_tensors.items(), start=1):
            shard = {name: _tensor(tensors, planned, neurons, name, written[name]) for name in names}
            save_file(shard, folder / file, metadata={"format": "pt"})
            (folder / file).chmod(0o666 & ~mask)  # safetensors creates private files
            report("writing", index, len(split.filename_to_tensors))
        planned.config.save_pretrained(folder)
    except (OSError, SafetensorError) as error:
        hint = file_hint(error) if isinstance(error, OSError) else "Check the path and the disk."
        hint = f"{hint} Nothing is left behind."
        raise BracesError(f"cannot write: {error}", where=str(folder), hint=hint) from error
    _add_older_rotation(folder / "config.json")
    if split.is_sharded:
        index_file = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index_file)


def _tensor(tensors: dict[str, Tensor], planned: Plan, neurons: Neurons, name: str, written: Tensor) -> Tensor:
    """One tensor of the checkpoint, contiguous, on the CPU, with the shape and dtype of `written`."""
    role, added = planned.roles.get(name), planned.wider - planned.width
    if name in planned.sources:
        source, first, last = planned.sources[name]
        tensor = tensors[source][first:last].detach().cpu()
    else:
        new_rows = 0 if role is None else added * role.widths
        tensor = torch.zeros(len(written) - new_rows, dtype=written.dtype)
    if role is not None:
        new = neurons.get(role.layer, {})
        if role.widths == 0 and "value.bias" in new:
            tensor = (tensor.float() + new["value.bias"]).to(tensor.dtype)
        elif role.widths > 0:
            parts = []
            for part, old in zip(role.parts, tensor.movedim(role.dim, 0).chunk(role.widths), strict=True):
                rows = old.new_zeros(added, *old.shape[1:])
                if part in new:
                    rows[: len(new[part])] = new[part]
                parts += [old, rows]
            tensor = torch.cat(parts).movedim(0, role.dim)
    assert tensor.shape == written.shape, f"{name} is {tuple(tensor.shape)}, expected {tuple(written.shape)}"
    return tensor.contiguous()


def _add_older_rotation(path: Path) -> None:
    """Add `rope_theta` and `rope_scaling` to a config: older programs ignore `rope_parameters` without an error."""
    config = read(WRITTEN, path)
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        older = {"rope_theta": rope["rope_theta"]}
        if rope.get("rope_type") != "default":
            older["rope_scaling"] = {name: value for name, value in rope.items() if name != "rope_theta"}
        write_json(path, dict(sorted((config | older).items())))
