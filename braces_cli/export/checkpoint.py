"""Write a plain checkpoint with additional neurons in its FFNs, and merge an adapter that way.

The base is in memory once. The written tensors are views of it, except the widened ones of the current shard (a layer).
"""

from __future__ import annotations

import gc
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

import torch
from msgspec import Meta
from torch import Tensor

from braces_cli.core.adapter.model import Adapter
from braces_cli.core.attributes.hooks import layer_steering
from braces_cli.core.errors import BracesError, ModelError
from braces_cli.core.files import file_hint, path_exists, user_path, write_json
from braces_cli.core.models.ffn import FFN, find_ffns
from braces_cli.core.progress import Report, silent
from braces_cli.core.schema import WRITTEN, Count, Kind, Name, read
from braces_cli.export.plan import Plan, Role, expected_form, observed_form, plain_ffns, plan
from braces_cli.export.run import Export, Opened, Request, base_shape, copy_companions, open_in_memory, probe_tokens
from braces_cli.export.verify import verify_export

# Layers are gathered in one file up to this size: small models are one file, large ones a file per layer.
SHARD_BYTES = 1 << 29

# Decoder layer -> A (d_r, d), B (d, d_r) in float32 on the CPU.
SidePaths = dict[int, tuple[Tensor, Tensor]]


class MergeRecord(TypedDict, total=False):
    """Entries of `braces_merge.json` that `braces merge --check` reads."""

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


_RECORD = Kind(MergeRecord, ModelError, "The file is damaged; merge again.")


@dataclass(frozen=True)
class MergeExport(Export):
    """Base and adapter as one plain checkpoint.

    Attributes:
        pad_to_multiple_of: the width of the FFN is rounded up to a multiple of this.
    """

    name = "merge"

    pad_to_multiple_of: int = 64

    def write(self, opened: Opened, folder: Path, report: Report) -> tuple[dict[str, Any], dict[str, Any]]:
        session, model = opened.session, opened.session.base.model
        ffns = plain_ffns(model, session.ffns)
        assert session.adapter is not None
        rank, paths = session.adapter.rank, side_paths(session.adapter)
        vectors = {each.layer: each.total[0] for each in layer_steering(session, opened.terms, opened.layers)}
        session.remove_adapter()
        form = observed_form(model, ffns, probe_tokens(session))
        merge_plan = plan(model, ffns, form, rank, self.pad_to_multiple_of, self.request.steers)
        write_checkpoint(folder, model, merge_plan, new_neurons(merge_plan, ffns, paths, vectors), report)
        copy_companions(session, folder)
        stored, attributes_dir = self.request.adapter, self.request.attributes_dir
        assert stored is not None
        # Local inputs by absolute paths, so that `--check` finds them from every working directory.
        entries = {
            "adapter": str(stored.folder) if user_path(stored.name).exists() else stored.name,
            "attributes_dir": None if attributes_dir is None else str(attributes_dir.resolve()),
        }
        return _plan_facts(merge_plan), entries

    def describe(self) -> dict[str, Any]:
        assert self.request.adapter is not None
        model = base_shape(self.request)
        ffns = plain_ffns(model, find_ffns(model))
        rank, form = self.request.adapter.config.r, expected_form(ffns[0])
        merge_plan = plan(model, ffns, form, rank, self.pad_to_multiple_of, self.request.steers)
        total = sum(shape.numel() for shape in merge_plan.shapes.values())
        return _plan_facts(merge_plan) | {"trainable_parameters": 0, "total_parameters": total}


def _plan_facts(merge_plan: Plan) -> dict[str, Any]:
    return {
        "architecture": merge_plan.architecture,
        "case": merge_plan.case,
        "neurons_added": merge_plan.wider - merge_plan.width,
        "width": merge_plan.wider,
    }


def read_record(folder: Path) -> MergeRecord:
    """Return the record in a merged checkpoint; empty without a record.

    Raises:
        ModelError: not a checkpoint, or a damaged record.
    """
    if not os.path.isfile(folder / "config.json"):  # pathlib's method raises if the name is too long
        raise ModelError("no merged checkpoint here", where=str(folder), hint="Give a folder that braces merge wrote.")
    path = folder / f"braces_{MergeExport.name}.json"
    return read(_RECORD, path) if path_exists(path) else {}


def check(request: Request, folder: Path) -> dict[str, Any]:
    """Verify again that `folder` is the request's base and adapter in one; writes nothing.

    Raises:
        ModelError: it is not.
    """
    record: Mapping[str, Any] = read_record(folder)
    expected = open_in_memory(request).reference()
    gc.collect()
    measured = verify_export(folder, expected)
    facts = {key: record[key] for key in ("architecture", "neurons_added", "case", "dtype") if key in record}
    return {"output_dir": str(folder), **facts, **request.facts(), **measured}


def side_paths(adapter: Adapter) -> SidePaths:
    """The low-rank factors of an adapter without experts."""
    paths = {}
    for ffn, adapter_layer in adapter.adapted_ffns:
        assert isinstance(ffn, FFN)
        with torch.no_grad():
            a, b = adapter_layer.factors(ffn.values(), torch.float32)
        paths[ffn.layer] = (a.cpu(), b.cpu())
    return paths


@dataclass(frozen=True)
class Neurons:
    """The n new neurons of one FFN with hidden size d, in float32 on the CPU.

    Attributes:
        gate: biases of the gates (n,); zeros without a gate and for padding.
        rows: weights of the inputs (n, d).
        columns: weights of the outputs (d, n).
        constant: added to the output bias (d,), or None.
        bias: biases of the inputs (n,), or None for zeros.
    """

    gate: Tensor
    rows: Tensor
    columns: Tensor
    constant: Tensor | None
    bias: Tensor | None = None


def new_neurons(
    merge_plan: Plan, ffns: Sequence[FFN], paths: SidePaths, vectors: Mapping[int, Tensor]
) -> dict[int, Neurons]:
    """New neurons of each decoder layer with a side path or a constant vector.

    Args:
        vectors: added to the FFN output of a layer, (d,).
    """
    neurons = {}
    for ffn in ffns:
        if ffn.layer not in paths and ffn.layer not in vectors:
            continue
        d = ffn.hidden_size
        a, b = paths.get(ffn.layer, (torch.zeros(0, d), torch.zeros(d, 0)))
        balance = _balance(a, b, ffn)
        # Powers of two, which do not round.
        rows, columns = a * balance.unsqueeze(1), b / balance / merge_plan.gate[1]
        if not merge_plan.form.gated:
            rows, columns = torch.cat([rows, -rows]), torch.cat([columns, -columns], dim=1)
        padding = merge_plan.wider - merge_plan.width - len(rows)
        neurons[ffn.layer] = Neurons(
            torch.cat([torch.full((len(rows),), merge_plan.gate[0]), torch.zeros(padding)]),
            torch.nn.functional.pad(rows, (0, 0, 0, padding)),
            torch.nn.functional.pad(columns, (0, padding)),
            vectors.get(ffn.layer),
        )
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
    folder: Path, model: torch.nn.Module, merge_plan: Plan, neurons: dict[int, Neurons], report: Report = silent
) -> None:
    """Write weights and config into `folder`.

    Args:
        model: the base, without an adapter.
        neurons: new neurons of decoder layers; other layers are padded with zeros.

    Raises:
        BracesError: the disk is full or not writable.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors = model.state_dict()
    merge_plan.config.dtype = model.dtype
    dtypes = {}
    for name in merge_plan.shapes:
        # A new bias has the dtype of its weight.
        weight = f"{name.rpartition('.')[0]}.weight"
        dtypes[name] = tensors[merge_plan.sources.get(name, merge_plan.sources.get(weight, ("",)))[0]].dtype
    sizes = {name: shape.numel() * dtypes[name].itemsize for name, shape in merge_plan.shapes.items()}
    total = sum(sizes.values())
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < total:
        hint = "Free some space, or choose an --output-dir on another disk."
        what = f"{total / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free"
        raise BracesError(what, where=str(folder), hint=hint)
    mask = os.umask(0)  # can only be read by setting it
    os.umask(mask)
    shards = list(_shards(sizes))
    files: dict[str, str] = {}
    try:
        for index, names in enumerate(shards, start=1):
            file = f"model-{index:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
            shard = {name: _tensor(tensors, merge_plan, neurons, name, dtypes[name]) for name in names}
            save_file(shard, folder / file, metadata={"format": "pt"})
            (folder / file).chmod(0o666 & ~mask)  # safetensors creates private files
            files |= dict.fromkeys(names, file)
            report("writing", index, len(shards))
        merge_plan.config.save_pretrained(folder)
    except (OSError, SafetensorError) as error:
        hint = file_hint(error) if isinstance(error, OSError) else "Check the path and the disk."
        hint = f"{hint} Nothing is left behind."
        raise BracesError(f"cannot write: {error}", where=str(folder), hint=hint) from error
    _add_older_rotation(folder / "config.json")
    if len(shards) > 1:
        index_file = {"metadata": {"total_size": total}, "weight_map": files}
        write_json(folder / "model.safetensors.index.json", index_file)


def _add_older_rotation(path: Path) -> None:
    """Add `rope_theta` and `rope_scaling` to a config: older programs ignore `rope_parameters` without an error."""
    config = read(WRITTEN, path)
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        older = {"rope_theta": rope["rope_theta"]}
        if rope.get("rope_type") != "default":
            older["rope_scaling"] = {name: value for name, value in rope.items() if name != "rope_theta"}
        write_json(path, dict(sorted((config | older).items())))


def _shards(sizes: dict[str, int]) -> Iterator[list[str]]:
    """Tensor names, layer by layer, gathered up to `SHARD_BYTES`."""
    groups: dict[str, list[str]] = {}
    for name in sizes:
        layer = re.match(r"(.*?\.\d+)\.", name)
        groups.setdefault(layer.group(1) if layer else name, []).append(name)
    shard: list[str] = []
    shard_bytes = 0
    for names in groups.values():
        size = sum(sizes[name] for name in names)
        if shard and shard_bytes + size > SHARD_BYTES:
            yield shard
            shard, shard_bytes = [], 0
        shard, shard_bytes = [*shard, *names], shard_bytes + size
    if shard:
        yield shard


def _tensor(
    tensors: dict[str, Tensor], merge_plan: Plan, neurons: dict[int, Neurons], name: str, dtype: torch.dtype
) -> Tensor:
    """One tensor of the checkpoint, contiguous, on the CPU."""
    role, shape = merge_plan.roles.get(name), merge_plan.shapes[name]
    if name in merge_plan.sources:
        source, first, last = merge_plan.sources[name]
        tensor = tensors[source][first:last].detach().cpu()
    else:
        added = 0
        if role is not None and role.part != "value.bias":
            added = (merge_plan.wider - merge_plan.width) * (2 if role.part.startswith("gate_up") else 1)
        tensor = torch.zeros(shape[0] - added, dtype=dtype)
    if role is not None:
        tensor = _with_neurons(tensor, role, merge_plan, neurons.get(role.layer))
    assert tensor.shape == shape, f"{name} is {tuple(tensor.shape)}, expected {tuple(shape)}"
    return tensor.contiguous()


def _with_neurons(tensor: Tensor, role: Role, merge_plan: Plan, new: Neurons | None) -> Tensor:
    """Append the new neurons to a tensor of an FFN; zeros if the layer has none."""
    part, dim = role.part, role.dim
    if part == "value.bias":
        constant = None if new is None else new.constant
        return tensor if constant is None else (tensor.float() + constant).to(tensor.dtype)
    if part.startswith("gate_up"):
        names = ("gate", "up") if merge_plan.form.gate_first else ("up", "gate")
        halves = zip(names, tensor.chunk(2, dim=dim), strict=True)
        roles = [(half, Role(role.layer, part.replace("gate_up", name), dim)) for name, half in halves]
        return torch.cat([_with_neurons(half, half_role, merge_plan, new) for half, half_role in roles], dim=dim)
    added = None
    if new is not None:
        added = {
            "gate.bias": new.gate, "up": new.rows, "key": new.rows, "value": new.columns.mT, "up.bias": new.bias,
            "key.bias": new.bias,
        }.get(part)  # fmt: skip
    if added is None:
        shape = list(tensor.shape)
        shape[dim] = merge_plan.wider - merge_plan.width
        added = tensor.new_zeros(shape)
    elif dim == 1:
        added = added.mT
    return torch.cat([tensor, added.to(tensor.dtype)], dim=dim)
