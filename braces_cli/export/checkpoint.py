"""The folder that an export writes: apart from its inputs, complete when it appears, absent when anything fails.

Write the merged checkpoint, one layer at a time: the base's tensors as they are, those of FFNs with new neurons.

The base lies in memory once; what is written of it are views, and beside it there are only the widened matrices of the
shard at hand, which is a layer.

GGUF files, written whole. Needs the package gguf.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from braces_cli.core.adapter.model import Adapter
from braces_cli.core.errors import BracesError, ConfigError, ModelError
from braces_cli.core.files import PARTIAL, check_output_folder, file_hint, output_lock, umask, write_atomic, write_json
from braces_cli.core.models.ffn import FFN
from braces_cli.core.progress import Report, silent
from braces_cli.core.schema import WRITTEN, read
from braces_cli.export.form import Plan, Role
from braces_cli.export.llama import take

# What makes a folder a model or an adapter.
_LOADED_BY = ("config.json", "adapter_config.json")
# What transformers loads beside the weights, by its name: how the model generates, and its tokenizer.
FILES_WITH_WEIGHTS = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "chat_template.jinja",
    "chat_template.json", "additional_chat_templates",
)  # fmt: skip
# All that programs load from such a folder by its name, and the records beside it: what an earlier export has of these
# would be taken for a part of the new one.
_LOADED = (
    *_LOADED_BY, *FILES_WITH_WEIGHTS, "model.safetensors", "model-*.safetensors", "model.safetensors.index.json",
    "adapter_model.safetensors", "modeling_braces.py", "braces_*.json",
)  # fmt: skip


def check_output(output: Path, overwrite: bool, inputs: Sequence[Path]) -> None:
    """See that an export may be written to `output`, before minutes of loading.

    Args:
        inputs: folders that are read, and must be neither written into nor replaced.

    Raises:
        ConfigError: the folder is not empty, is or holds the working directory, or is, holds or lies in one of the
            inputs.
    """
    check_output_folder(output, overwrite)
    inside, here = output.resolve(), Path.cwd()
    if inside == here or inside in here.parents:
        hint = "Name a folder that is to be created."
        what = "the output folder cannot hold the working directory: a new folder may take its place"
        raise ConfigError(what, where=str(output), hint=hint)
    for source in inputs:
        outside = source.resolve()
        if inside == outside or outside in inside.parents or inside in outside.parents:
            hint = "Give an --output-dir that neither lies in an input nor holds one."
            raise ConfigError(f"the output folder overlaps the input {source}", where=str(output), hint=hint)


@contextmanager
def new_folder(output: Path, overwrite: bool) -> Iterator[Path]:
    """A new folder beside `output` that takes its place when all has gone well, and is gone otherwise.

    An `output` that holds something keeps what no export has written.

    Raises:
        ConfigError: another command is writing there.
        BracesError: the disk is full, or refuses.
    """
    path = Path(os.path.realpath(output))
    with output_lock(output):
        folder = None
        try:
            folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=PARTIAL, dir=path.parent))
            yield folder
            # mkdtemp makes folders for the owner alone; give what a plain mkdir() would have given.
            folder.chmod(0o777 & ~umask())
            _rename(folder, path, overwrite)
        except OSError as error:
            what = f"cannot write: {error.strerror or error}"
            raise BracesError(what, where=str(output), hint=file_hint(error)) from error
        finally:
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)


def _rename(folder: Path, path: Path, overwrite: bool) -> None:
    # Once more: the folder may have been filled since the work began.
    check_output_folder(path, overwrite)
    if not path.exists() or not any(path.iterdir()):
        folder.replace(path)
        return
    _move_into(folder, path)


def _move_into(folder: Path, output: Path) -> None:
    """Move what is in `folder` into `output`, which holds an earlier export, files of others, or both; these stay.

    What an export is loaded by is removed first and moved last: interrupted, `output` is no checkpoint, rather than
    one of two halves.
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


# Layers are gathered in one file up to so many bytes: small models are one file, large ones a layer each.
SHARD_BYTES = 1 << 29
# What travels with the weights: everything that a tokenizer may be made of, and how the model generates.
_CARRIED = (
    *FILES_WITH_WEIGHTS, "tokenizer*", "vocab*", "*.tiktoken", "*.model", "spiece*", "chat_template*", "LICENSE*",
    "NOTICE*",
)  # fmt: skip


@dataclass(frozen=True)
class Neurons:
    """What one FFN gains, all in float32 on the CPU; n new neurons, d model width.

    Attributes:
        gate: biases of the gates (n,), zeros where there is no gate or the neuron is padding.
        rows: what the neurons read (n, d).
        columns: what they write (d, n).
        constant: added to the output bias (d,), None where nothing steers.
        bias: added to what the neurons read (n,), None is zeros.
    """

    gate: Tensor
    rows: Tensor
    columns: Tensor
    constant: Tensor | None
    bias: Tensor | None = None


def new_neurons(
    adapter: Adapter, plan: Plan, steering_vectors: Mapping[int, Tensor] | None = None
) -> dict[int, Neurons]:
    """New neurons of each decoder layer that carries the adapter or a steering vector.

    The steering set on the adapter just now is written, too.

    Args:
        steering_vectors: added to the FFN output of a layer, (d,).
    """
    neurons, steering_vectors = {}, steering_vectors or {}
    for ffn, adapter_layer in adapter.adapted_ffns:
        assert isinstance(ffn, FFN)
        with torch.no_grad():
            reads, writes = adapter_layer.factors(ffn.values(), torch.float32)  # A (d_r, d), B (d, d_r)
            constant = None if adapter_layer.shift is None else (writes @ adapter_layer.shift).cpu()
            steering_vector = steering_vectors.get(ffn.layer)
            constant = (
                steering_vector
                if constant is None
                else constant
                if steering_vector is None
                else constant + steering_vector
            )
            balance = _balance(reads, writes, ffn)
        # By powers of two, which round nothing.
        rows, columns = (reads * balance.unsqueeze(1)).cpu(), (writes / balance).cpu() / plan.gate[1]
        if not plan.form.gated:
            rows, columns = torch.cat([rows, -rows]), torch.cat([columns, -columns], dim=1)
        padding = plan.wider - plan.width - len(rows)
        neurons[ffn.layer] = Neurons(
            torch.cat([torch.full((len(rows),), plan.gate[0]), torch.zeros(padding)]),
            torch.nn.functional.pad(rows, (0, 0, 0, padding)),
            torch.nn.functional.pad(columns, (0, padding)),
            constant,
        )
    added = plan.wider - plan.width
    for layer in steering_vectors.keys() - neurons.keys():
        nothing = torch.zeros(added, len(steering_vectors[layer]))
        neurons[layer] = Neurons(torch.zeros(added), nothing, nothing.mT, steering_vectors[layer])
    return neurons


def _balance(reads: Tensor, writes: Tensor, ffn: FFN) -> Tensor:
    """For each neuron the power of two after which its row and column stand out equally from the base's own, (d_r,).

    In a format with one scale for many weights, a neuron far larger or smaller than its neighbours costs digits.
    """
    values = ffn.values()
    assert isinstance(values, Tensor)
    key: Any = ffn.keys[-1]
    keys = key.weight if hasattr(key, "out_features") else key.weight.mT
    typical_row, typical_column = _typical(keys), _typical(values.mT)
    row, column = reads.norm(dim=1) / typical_row, writes.norm(dim=0) / typical_column
    ratio = (column / row).clamp(min=1e-9, max=1e9)
    balance: Tensor = torch.exp2((ratio.log2() / 2).round())
    return balance


def _typical(rows: Tensor) -> Tensor:
    """Median norm of the rows, over at most some hundred of them."""
    sample = rows.detach()[:: max(1, len(rows) // 256)].float()
    return sample.norm(dim=1).median().clamp(min=1e-12)


def write_checkpoint(
    folder: Path,
    model: torch.nn.Module,
    plan: Plan,
    neurons: dict[int, Neurons],
    layers: list[int],
    report: Report = silent,
) -> int:
    """Write weights and config of the merged model into `folder`; returns the bytes of the weights.

    Args:
        model: the base, nothing attached.
        layers: decoder layer of each FFN.

    Raises:
        BracesError: the disk is full, or cannot be written to.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors = model.state_dict()
    sizes = {name: shape.numel() * _dtype(tensors, plan, name).itemsize for name, shape in plan.shapes.items()}
    total = sum(sizes.values())
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < total:
        hint = "Free some space, or give --output-dir on another disk."
        raise BracesError(
            f"{total / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free", where=str(folder), hint=hint
        )
    shards = list(_shards(sizes))
    files: dict[str, str] = {}
    try:
        for index, names in enumerate(shards, start=1):
            file = f"model-{index:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
            shard_tensors = {name: _tensor(tensors, plan, neurons, layers, name) for name in names}
            save_file(shard_tensors, folder / file, metadata={"format": "pt"})
            (folder / file).chmod(0o666 & ~umask())  # which safetensors creates for the owner alone
            files |= dict.fromkeys(names, file)
            report("writing", index, len(shards))
        plan.config.save_pretrained(folder)
        _name_rotation(folder / "config.json")
    except (OSError, SafetensorError) as error:
        hint = file_hint(error) if isinstance(error, OSError) else "Check the path and the disk."
        raise BracesError(
            f"cannot write: {error}", where=str(folder), hint=f"{hint} Nothing is left behind."
        ) from error
    if len(shards) > 1:
        index_file = {"metadata": {"total_size": total}, "weight_map": files}
        write_json(folder / "model.safetensors.index.json", index_file)
    return total


def _name_rotation(path: Path) -> None:
    """Say how positions are rotated in the older words, too: programs that know no `rope_parameters` would not miss
    them, and read another base frequency."""
    config = read(WRITTEN, path)
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
        older = {"rope_theta": rope["rope_theta"]}
        if rope.get("rope_type") != "default":
            older["rope_scaling"] = scaling
        write_json(path, dict(sorted((config | older).items())))


def _dtype(tensors: dict[str, Tensor], plan: Plan, name: str) -> torch.dtype:
    """Of a tensor that is written; a new bias takes that of its weight."""
    source = plan.sources.get(name) or plan.sources[f"{name.rpartition('.')[0]}.weight"]
    return tensors[source[0]].dtype


def _shards(sizes: dict[str, int]) -> Iterator[list[str]]:
    """Names, layer by layer, gathered up to `SHARD_BYTES`."""
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
    tensors: dict[str, Tensor], plan: Plan, neurons: dict[int, Neurons], layers: list[int], name: str
) -> Tensor:
    """One tensor of the merged checkpoint, contiguous, on the CPU."""
    role = plan.roles.get(name)
    shape = plan.shapes[name]
    if name in plan.sources:
        tensor = take(tensors, plan.sources[name]).detach().cpu()
    else:
        length = shape[0]
        if role is not None and role.part != "value.bias":
            length -= (plan.wider - plan.width) * (2 if role.part.startswith("gate_up") else 1)
        tensor = torch.zeros(length, dtype=_dtype(tensors, plan, name))
    if role is not None:
        tensor = _grown(tensor, role, plan, neurons.get(layers[role.ffn]))
    assert tensor.shape == shape, f"{name} is {tuple(tensor.shape)}, wanted {tuple(shape)}"
    return tensor.contiguous()


def _grown(tensor: Tensor, role: Role, plan: Plan, new: Neurons | None) -> Tensor:
    """The tensor with what the new neurons need; zeros where the layer carries no adapter."""
    part = role.part
    if part == "value.bias":
        constant = None if new is None else new.constant
        return tensor if constant is None else (tensor.float() + constant).to(tensor.dtype)
    count = plan.wider - plan.width
    if part.startswith("gate_up"):
        halves = [Role(role.ffn, part.replace("gate_up", name), role.dim) for name in ("gate", "up")]
        if not plan.form.gate_first:
            halves.reverse()
        both = zip(tensor.chunk(2, dim=role.dim), halves, strict=True)
        return torch.cat([_grown(half, half_role, plan, new) for half, half_role in both], dim=role.dim)
    piece = None
    if new is not None:
        pieces = {"gate.bias": new.gate, "up": new.rows, "key": new.rows, "value": new.columns.mT}
        piece = (pieces | dict.fromkeys(("up.bias", "key.bias"), new.bias)).get(part)
    if piece is None:
        shape = list(tensor.shape)
        shape[role.dim] = count
        piece = tensor.new_zeros(shape)
    elif role.dim == 1:
        piece = piece.mT
    return torch.cat([tensor, piece.to(tensor.dtype)], dim=role.dim)


def companions(source: Path) -> list[Path]:
    """Files and folders of a base that travel with its weights.

    Raises:
        ModelError: one is a link to somewhere else on this disk, whose content nobody meant to hand on.
    """
    carried = sorted({path for pattern in _CARRIED for path in source.glob(pattern)})
    place = Path(os.path.realpath(source))
    # The hub's cache keeps a model's files beside the folders of its revisions, which hold links.
    place = next((folder for folder in place.parents if folder.name.startswith("models--")), place)
    for path in carried:
        for file in (path, *sorted(path.rglob("*"))):
            target = Path(os.path.realpath(file))
            if place not in target.parents or not target.exists():
                hint = "Put a copy of the file in its place, or remove the link."
                raise ModelError("this link leads out of the model's folder", where=str(file), hint=hint)
    return carried


def copy_companions(source: Path, folder: Path, tokenizer: Any) -> list[str]:
    """Copy tokenizer, chat template, generation config and licence of a base, as they are; returns their names.

    Where the tokenizer's files name no class, transformers picks one by the type of the model, which may be another
    one in `folder`: there the class of `tokenizer`, the base's own, is written down.

    Raises:
        ModelError: see `companions`.
        BracesError: cannot be written.
    """
    carried = companions(source)
    try:
        for path in carried:
            if path.is_dir():
                shutil.copytree(path, folder / path.name)
            else:
                shutil.copyfile(path, folder / path.name)
    except OSError as error:
        raise BracesError(f"cannot write: {error.strerror}", where=str(folder), hint=file_hint(error)) from error
    path = folder / "tokenizer_config.json"
    settings = read(WRITTEN, path) if path.is_file() else {}
    if not settings.get("tokenizer_class") and type(tokenizer).__module__.startswith("transformers."):
        write_json(path, settings | {"tokenizer_class": type(tokenizer).__name__})
    return [path.name for path in carried]


def write_gguf_tensors(
    path: Path, architecture: str, tensors: dict[str, Tensor], describe: Callable[[Any], object]
) -> None:
    """Write tensors, float32, with what `describe` adds to the header through gguf's writer.

    Raises:
        BracesError: cannot be written.
    """
    from gguf import GGUFReader, GGUFWriter

    def write(place: Path) -> None:
        writer = GGUFWriter(place, architecture)
        describe(writer)
        for name, tensor in tensors.items():
            writer.add_tensor(name, tensor.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    def matches(place: Path) -> bool:
        try:
            stored = {tensor.name: torch.tensor(tensor.data.copy()) for tensor in GGUFReader(place).tensors}
        except (ValueError, IndexError):  # cut off: numpy, which writes the tensors, does not notice a full disk
            return False
        return stored.keys() == tensors.keys() and all(torch.equal(stored[name], tensors[name]) for name in tensors)

    write_atomic(path, write, matches)
