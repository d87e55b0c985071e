"""Merge an adapter into a plain checkpoint: with additional neurons in its FFNs, or with edited value vectors.

    relevance to the input      FFN(h) + B (A h) + b            new neurons, see `export.plan`
    relevance to the output     (I + B A) FFN(h) + b            W_V <- (I + B A) W_V, bias <- (I + B A) bias + b

The base is in memory once. The written tensors are views of it, except the changed ones of the current file.
`save_checkpoint` takes the tensors from a function, so an export may change any of them.
"""

import gc
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from msgspec import Meta
from torch import Tensor

from braces_cli.core.adapter.files import find_adapter
from braces_cli.core.adapter.model import Adapter
from braces_cli.core.attributes.hooks import LayerSteering, layer_steering, remaining, steered
from braces_cli.core.errors import BracesError, ModelError
from braces_cli.core.files import file_hint, user_path, write_json
from braces_cli.core.models.ffn import FFN, Experts, MixtureFFN, find_ffns, parameter_total
from braces_cli.core.progress import Report, silent
from braces_cli.core.schema import WRITTEN, Count, Kind, Name, read
from braces_cli.export.plan import Plan, ffn_form, plan, refuse
from braces_cli.export.run import Opened, Request, base_shape, copy_companions, open_request, probe_tokens, run
from braces_cli.export.verify import reference, verify_export

# Tensors are gathered in one file up to this size, which bounds the memory of widened tensors.
SHARD_BYTES = 1 << 29

# Decoder layer -> A (d_r, d), B (d, d_r) in float32 on the CPU.
SidePaths = dict[int, tuple[Tensor, Tensor]]
# Decoder layer -> part, as in `Role` -> weights of the n new neurons (n, d) or biases (n,) in float32 on the CPU, and
# what is added to the bias of `value` (d,). Missing parts and neurons are zero.
Neurons = dict[int, dict[str, Tensor]]
_AS_LORA = "Write a LoRA for the base: braces export lora, with an attribute also --combine."
_AS_SERVED = "Or serve the adapter with braces steer --adapter."


@dataclass(frozen=True)
class ValueEdit:
    """Effect of relevance to the output on one FFN or on stacked experts, in float32.

    Attributes:
        layer: decoder layer.
        part: its value vectors W_V change by B A W_V.
        a, b: A (d_r, d) and B (..., d, d_r); zero if the layer is only steered.
        turned: B A bias, (..., d); None without a bias.
        constant: steering, added to the bias, (..., d); None without steering.
    """

    layer: int
    part: FFN | Experts
    a: Tensor
    b: Tensor
    turned: Tensor | None
    constant: Tensor | None


@dataclass(frozen=True, kw_only=True)
class MergeRecord:
    """Entries of `braces_merge.json` that `braces merge --check` reads."""

    model: Name
    adapter: Name | None
    attributes: dict[Annotated[str, Meta(pattern=r"^\w[\w.-]*\Z")], float]
    architecture: str
    neurons_added: Count
    case: str
    dtype: Literal["float32", "bfloat16", "float16", "float64"]
    revision: Name | None = None
    attributes_dir: Name | None = None
    layers: Annotated[str, Meta(pattern=r"^[\d, -]+\Z")] | None = None


_RECORD = Kind(MergeRecord, ModelError, "Give a folder that `braces merge` wrote; if the file is damaged, merge again.")


def read_record(folder: Path) -> MergeRecord:
    """Return the record in a merged checkpoint; raises ModelError if it is missing or damaged."""
    return read(_RECORD, folder / "braces_merge.json")


def export_merge(request: Request, pad_to_multiple_of: int = 64, report: Report = silent) -> dict[str, Any]:
    """Write base and adapter as one plain checkpoint, with FFNs of a width rounded up; see `export.run.run`.

    Without an adapter, the base is written: a GGUF file, or with directions erased.
    """

    def write(opened: Opened, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
        session, stored, attributes_dir = opened.session, opened.session.stored, request.attributes_dir
        model, erased = session.base.model, opened.erase
        copy_companions(session, folder)
        about = {} if not erased else {"erased": list(request.erase), "remaining": remaining(session, erased)}
        if stored is None or stored.config.relevance_to == "output":
            with steered(session, opened.terms, opened.layers) as steering:
                vectors = steering_vectors(steering)
                edits = [] if session.adapter is None else value_edits(session.adapter, session.ffns, vectors)
                missing = edit_values(model, edits)
            session.remove_adapter()
            edit_values(model, erasures(session.ffns, erased))
            architecture = write_edited(folder, model, session.ffns, missing, probe_tokens(session), report)
            facts = same_shape(architecture, "plain" if stored is None and not erased else "values")
        else:
            assert session.adapter is not None
            paths = {
                layer: (a, b - erased[layer] @ (erased[layer].mT @ b) if layer in erased else b)
                for layer, (a, b) in side_paths(session.adapter).items()
            }
            vectors = {each.layer: each.total[0] for each in layer_steering(session, opened.terms, opened.layers)}
            session.remove_adapter()
            edit_values(model, erasures(session.ffns, erased))
            planned, facts = plan_merge(request, model, session.ffns, pad_to_multiple_of, probe_tokens(session))
            write_checkpoint(folder, model, planned, new_neurons(planned, paths, vectors), report)
        if stored is None:
            return facts | about, {}
        # Local inputs by absolute paths, so that `--check` finds them from every working directory.
        adapter = str(stored.folder) if user_path(stored.name).exists() else stored.name
        return facts | about, {"adapter": adapter, "attributes_dir": attributes_dir and str(attributes_dir.resolve())}

    return run("erase" if request.erase else "merge", request, write, verify_export, report)


@torch.no_grad()
def erasures(ffns: Sequence[FFN | MixtureFFN], directions: Mapping[int, Tensor]) -> Iterator[ValueEdit]:
    """Return the edits W_V <- (I - U U^T) W_V, bias likewise, of every part of the layers in `directions`."""
    for ffn in ffns:
        for part in ffn.parts if ffn.layer in directions else ():
            values, bias = part.value_matrix(), part.bias()
            a = directions[ffn.layer].mT.to(values.device)
            turned = None if bias is None else -(bias.float() @ a.mT) @ a
            yield ValueEdit(ffn.layer, part, a, -a.mT.expand(*values.shape[:-2], *a.mT.shape), turned, None)


def same_shape(architecture: str, case: str) -> dict[str, Any]:
    """What is printed of a checkpoint of the base's shape."""
    return {"architecture": architecture, "case": case, "neurons_added": 0}


def plan_merge(
    request: Request, model: Any, found: Sequence[FFN | MixtureFFN], pad_to_multiple_of: int, ids: Tensor | None = None
) -> tuple[Plan, dict[str, Any]]:
    """Return the plan, and what is printed of it; without weights if `ids` is None."""
    assert request.adapter is not None
    ffns, form = ffn_form(model, found, ids)
    neurons, steered = request.adapter.config.r * (1 if form.gated else 2), any(request.attributes.values())
    planned = plan(model, ffns, form, neurons, pad_to_multiple_of, ["value"] if steered else [])
    facts = {
        "architecture": planned.architecture,
        "case": planned.case,
        "neurons_added": planned.wider - planned.width,
        "width": planned.wider,
    }
    return planned, facts


def describe_merge(request: Request, pad_to_multiple_of: int) -> dict[str, Any]:
    """Facts of a merge that are known without the weights, for `--dry-run`."""
    shape, adapter = base_shape(request), request.adapter
    if adapter is None or adapter.config.relevance_to == "output":
        facts = same_shape(type(shape).__name__, "plain" if adapter is None else "values")
        return facts | {"trainable_parameters": 0, "total_parameters": parameter_total(shape)}
    planned, facts = plan_merge(request, shape, find_ffns(shape), pad_to_multiple_of)
    return facts | planned.size


def check(request: Request, folder: Path) -> dict[str, Any]:
    """Verify again that `folder` is base and adapter in one; writes nothing.

    Args:
        request: its empty fields are those of the record.

    Raises:
        ModelError: it is not.
    """
    record, options = read_record(folder), request.options
    directory = Path(record.attributes_dir) if record.attributes_dir else None
    if options.dtype == "auto":
        options = replace(options, dtype=record.dtype)
    request = Request(
        model=request.model or record.model,
        adapter=request.adapter or (find_adapter(record.adapter) if record.adapter else None),
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


def steering_vectors(steering: Sequence[LayerSteering]) -> dict[int, Tensor]:
    """Steering vector of each decoder layer that has one; without what attributes add through the adapter."""
    return {each.layer: each.vector for each in steering if each.vector is not None}


@torch.no_grad()
def value_edits(
    adapter: Adapter, ffns: Sequence[FFN | MixtureFFN], vectors: Mapping[int, Tensor]
) -> Iterator[ValueEdit]:
    """Return the edits of an adapter with relevance to the output, with its current steering through the adapter.

    Args:
        ffns: of the base.
        vectors: steering vector of each decoder layer, (d,).

    Raises:
        ModelError: a steering vector is added after a mixture of experts.
    """
    modules = {ffn.layer: module for ffn, module in adapter.adapted_ffns}
    for ffn in ffns:
        module, vector = modules.get(ffn.layer), vectors.get(ffn.layer)
        if module is None and vector is None:
            continue
        if vector is not None and isinstance(ffn, MixtureFFN):
            reason = f"layer {ffn.layer} is steered after a mixture of experts, which has no bias"
            raise refuse(adapter.model, reason, f"Leave --attribute out. {_AS_SERVED}")
        for part in ffn.parts:
            bias, constant = part.bias(), vector
            if module is None:
                a, b = torch.zeros(adapter.rank, ffn.hidden_size), torch.zeros(ffn.hidden_size, adapter.rank)
            else:
                a, b = module.factors(part.values(), torch.float32)
                if module.shift is not None:
                    through = b @ module.shift.to(b)
                    constant = through if vector is None else through + vector.to(b)
            turned = None if bias is None else (b @ (a @ bias.to(a).unsqueeze(-1))).squeeze(-1)
            yield ValueEdit(ffn.layer, part, a, b, turned, constant)


@torch.no_grad()
def edit_values(model: Any, edits: Iterable[ValueEdit]) -> dict[int, Tensor]:
    """Edit value vectors and biases of `model` in place; returns the constants of layers without a bias.

    Raises:
        ModelError: the weights are quantised, or several layers share them.
    """
    if getattr(model.config, "auto_map", None):
        raise refuse(model, "it brings its own code, which a plain checkpoint cannot use")
    owners = Counter(p.data_ptr() for module in model.modules() for p in module.parameters(recurse=False))
    missing = {}
    for edit in edits:
        values, bias = edit.part.values(), edit.part.bias()
        if not isinstance(values, Tensor):
            raise refuse(model, "its weights are quantised")
        if owners[values.data_ptr()] > 1:
            raise refuse(model, f"layer {edit.layer} shares its value vectors with another layer", _AS_LORA)
        stacked, columns = (each if each.ndim == 3 else each.unsqueeze(0) for each in (values.detach(), edit.b))
        # Expert by expert, because the result is computed in float32.
        for matrix, each in zip(stacked, columns, strict=True):
            matrix.copy_(matrix + each @ (edit.a @ matrix.float()))
        if bias is not None and edit.turned is not None:
            bias.copy_(bias + edit.turned if edit.constant is None else bias + edit.turned + edit.constant)
        elif edit.constant is not None:
            missing[edit.layer] = edit.constant.cpu()
    return missing


def write_edited(
    folder: Path,
    model: Any,
    ffns: Sequence[FFN | MixtureFFN],
    constants: dict[int, Tensor],
    ids: Tensor,
    report: Report = silent,
) -> str:
    """Write a model with edited value vectors; returns the class of the checkpoint.

    Args:
        constants: added to the FFN output of layers without a bias; needs a config, or a Llama, with biases.
        ids: tokens for a forward pass, see `ffn_form`.

    Raises:
        ModelError: a constant has no place.
    """
    if not constants:
        write_model(folder, model, report)
        return type(model).__name__
    try:
        plain, form = ffn_form(model, ffns, ids)
        planned = plan(model, plain, form, 0, 1, ["value"])
    except ModelError as error:
        message = error.message.replace("be merged", "take an attribute in a bias")
        mixed = any(isinstance(part, Experts) for ffn in ffns for part in ffn.parts)
        hint = f"Leave --attribute out. {_AS_SERVED if mixed else _AS_LORA}"
        raise ModelError(message, hint=hint) from error
    write_checkpoint(folder, model, planned, new_neurons(planned, {}, constants), report)
    return planned.architecture


def write_model(folder: Path, model: Any, report: Report = silent) -> None:
    """Write `model` as a checkpoint of its class, with the tensor names of its files on the hub."""
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    tensors = model.state_dict()
    for name in model._keys_to_ignore_on_save or ():
        tensors.pop(name, None)
    tensors = revert_weight_conversion(model, remove_tied_weights_from_state_dict(tensors, model))
    model.config.dtype, model.config.architectures = model.dtype, [type(model).__name__]
    written = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
    save_checkpoint(folder, model.config, written, lambda name: tensors[name].cpu().contiguous(), report)


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
    sizes = []
    for rows, norms in ((keys, a.norm(dim=1)), (values.mT, b.norm(dim=0))):
        # The median of a few hundred rows.
        typical = rows.detach()[:: max(1, len(rows) // 256)].float().norm(dim=1).median()
        sizes.append(norms / typical.clamp(min=1e-12).cpu())
    ratio = (sizes[1] / sizes[0]).clamp(min=1e-9, max=1e9)
    balance: Tensor = torch.exp2((ratio.log2() / 2).round())
    return balance


def write_checkpoint(
    folder: Path, model: torch.nn.Module, planned: Plan, neurons: Neurons, report: Report = silent
) -> None:
    """Write the planned checkpoint of `model`, a base without an adapter, with the new neurons into `folder`."""
    tensors = model.state_dict()
    planned.config.dtype = model.dtype
    written = {}
    for name, shape in planned.shapes.items():
        # A new bias has the dtype of its weight.
        source = planned.sources.get(name) or planned.sources[f"{name.rpartition('.')[0]}.weight"]
        written[name] = torch.empty(shape, dtype=tensors[source[0]].dtype, device="meta")
    tensor = partial(_widened, tensors, planned, neurons, written)
    save_checkpoint(folder, planned.config, written, tensor, report)


def save_checkpoint(
    folder: Path, config: Any, written: dict[str, Tensor], tensor: Callable[[str], Tensor], report: Report = silent
) -> None:
    """Write weights and config into `folder`.

    Args:
        written: the tensors on the meta device, in order.
        tensor: returns a tensor of `written` with its values; called for one file at a time.

    Raises:
        BracesError: the disk is full or not writable.
    """
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    split = split_torch_state_dict_into_shards(written, max_shard_size=SHARD_BYTES)
    mask = os.umask(0)  # can only be read by setting it
    os.umask(mask)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        for index, (file, names) in enumerate(split.filename_to_tensors.items(), start=1):
            save_file({name: tensor(name) for name in names}, folder / file, metadata={"format": "pt"})
            (folder / file).chmod(0o666 & ~mask)  # safetensors creates private files
            report("writing", index, len(split.filename_to_tensors))
        config.save_pretrained(folder)
    except (OSError, SafetensorError) as error:
        hint = file_hint(error) if isinstance(error, OSError) else "Check the path and the disk."
        hint = f"{hint} Nothing is left behind."
        raise BracesError(f"cannot write: {error}", where=str(folder), hint=hint) from error
    stored = read(WRITTEN, folder / "config.json")
    rope = stored.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        # Older programs ignore `rope_parameters` without an error.
        stored["rope_theta"] = rope["rope_theta"]
        if rope.get("rope_type") != "default":
            stored["rope_scaling"] = {name: value for name, value in rope.items() if name != "rope_theta"}
        write_json(folder / "config.json", dict(sorted(stored.items())))
    if split.is_sharded:
        index_file = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index_file)


def _widened(
    tensors: dict[str, Tensor], planned: Plan, neurons: Neurons, written: dict[str, Tensor], name: str
) -> Tensor:
    """One tensor of the checkpoint, contiguous, on the CPU, with the shape and dtype of `written[name]`."""
    expected = written[name]
    role, added = planned.roles.get(name), planned.wider - planned.width
    if name in planned.sources:
        source, first, last = planned.sources[name]
        tensor = tensors[source][first:last].detach().cpu()
    else:
        new_rows = 0 if role is None or role.dim is None else added * len(role.parts)
        tensor = torch.zeros(len(expected) - new_rows, dtype=expected.dtype)
    new = {} if role is None else neurons.get(role.layer, {})
    if role is not None and role.dim is not None:
        parts = []
        for part, old in zip(role.parts, tensor.movedim(role.dim, 0).chunk(len(role.parts)), strict=True):
            rows = old.new_zeros(added, *old.shape[1:])
            if part in new:
                rows[: len(new[part])] = new[part]
            parts += [old, rows]
        tensor = torch.cat(parts).movedim(0, role.dim)
    elif "value.bias" in new:
        tensor = (tensor.float() + new["value.bias"]).to(tensor.dtype)
    assert tensor.shape == expected.shape, f"{name} is {tuple(tensor.shape)}, expected {tuple(expected.shape)}"
    return tensor.contiguous()
