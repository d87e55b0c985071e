"""The adapter folder: find, read, check and write its config and tensors."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

from braces_cli.core import files
from braces_cli.core.errors import BracesError, ModelError
from braces_cli.core.models.hub import hub_errors, is_hub_id
from braces_cli.core.models.identity import SAMPLES, Sizes
from braces_cli.core.schema import Count, Kind, Name, Positive, Relevance, Size, check, cut, read

if TYPE_CHECKING:
    from torch import Tensor

FORMAT_VERSION = 1
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
CARD_FILE = "README.md"
_PATTERNS = ["*.json", "*.safetensors", CARD_FILE]
# How far rows of a saved projection may be from orthonormal: rounding of float32, not training noise.
ORTHONORMAL_TOLERANCE = 1e-5


@dataclass(frozen=True)
class AdapterConfig:
    """Content of `adapter_config.json`.

    Attributes:
        base_model_name_or_path: hub id or folder of the base.
        r: rank d_r.
        layers: indices of the decoder layers with a relevance module.
        base: type and sizes of the base.
        revision: commit of a base from the hub.
        tokenizer: hashes of the tokenizer and its chat template; another one is a warning, not an error.
        training: settings of the training run; recorded only.
        attributes: names of trained attributes; with any, the file holds the MLP of `core.adapter.layer`.
        relevance_to: what the value vectors are compared with, the FFN's input or its output.
        relevance_scale: c of each of `layers`, the constant factor of its relevance scores.
        chat_template: template of the training data, if it is not that of the base.
        end_of_turn: tokens and texts that end an assistant's turn, if the adapter was trained on chats.
        versions: versions of libraries; recorded only.
    """

    base_model_name_or_path: Name
    r: Size
    layers: list[Count]
    base: Sizes
    revision: Name | None = None
    tokenizer: dict[str, str | None] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    attributes: list[Name] = field(default_factory=list)
    relevance_to: Relevance = "input"
    relevance_scale: list[Positive] = field(default_factory=list)
    chat_template: str | None = None
    end_of_turn: list[Name] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION
    method: str = "braces"

    @property
    def parameters(self) -> int:
        """Number of parameters in projections and gates, without the MLP of attributes."""
        return len(self.layers) * parameter_count(self.r, int(self.base["hidden_size"]), self.relevance_to)


_DAMAGED = "The file is damaged; train again."
# Config of an adapter of braces or of peft.
ANY_CONFIG: Kind[dict[str, Any]] = Kind(dict[str, Any], ModelError, _DAMAGED, "config of an adapter")
_CONFIG = Kind(AdapterConfig, ModelError, _DAMAGED, closed=True)


class PeftConfig(TypedDict):
    """Keys of a config of peft that are read here; peft reads the others."""

    peft_type: str
    base_model_name_or_path: NotRequired[Name | None]
    revision: NotRequired[Name | None]
    task_type: NotRequired[Name | None]


_PROMPT_TYPES = (
    "PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "CARTRIDGE", "ADAPTION_PROMPT"
)  # fmt: skip
# Types of peft that load other files, or that are not layers of the base.
_REFUSED_TYPES = {
    **dict.fromkeys(_PROMPT_TYPES, "adds prompt tokens, not layers"),
    "XLORA": "loads other adapters",
    "POLY": "needs the task of each row",
    "SHADOW": "runs a second model",
}


def check_peft_config(raw: dict[str, Any], where: str, error: type[BracesError], hint: str) -> PeftConfig:
    """Check a config before peft reads it: peft imports modules and loads files that some configs name.

    Args:
        error: class of the errors.
        hint: for a type that is refused.
    """
    config = check(Kind(PeftConfig, error, "Save the config with peft again."), raw, where)
    if raw.get("megatron_config") is not None or raw.get("megatron_core") not in (None, "megatron.core"):
        key = "megatron_core" if raw.get("megatron_config") is None else "megatron_config"
        raise error(f"`{key}`: peft imports a module for this key", where=where, hint="Remove the key.")
    reason = _REFUSED_TYPES.get(config["peft_type"])
    if reason is not None:
        raise error(f"`peft_type`: {config['peft_type']} {reason}", where=where, hint=hint)
    task = config.get("task_type")
    if task not in (None, "CAUSAL_LM"):
        hint = "Give an adapter of a causal language model."
        raise error(f"`task_type`: the adapter is for {cut(task)}, not for CAUSAL_LM", where=where, hint=hint)
    return config


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter in a folder, with its config read and checked.

    Attributes:
        name: folder or hub id, as the user wrote it.
        folder: folder of its files.
    """

    name: str
    folder: Path
    config: AdapterConfig

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Tensors of the adapter, read on first use; checks names, shapes, dtype, finite numbers, orthonormal rows."""
        import torch
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        from braces_cli.core.adapter.layer import condition_shapes, projection_error

        path = self.folder / WEIGHTS_FILE
        try:
            files.check_regular(path, ModelError, "Train again.", "file of the adapter's weights")
            tensors = load_file(path)
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"cannot read the adapter's weights: {error}", where=str(path), hint="Train again."
            ) from error
        config, d = self.config, self.config.base["hidden_size"]
        shapes: dict[str, tuple[int, ...]] = {}
        for layer in config.layers:
            of_layer = relevance_shapes(config.r, d, config.relevance_to)
            shapes |= {f"layers.{layer}.{name}": shape for name, shape in of_layer.items()}
            shapes[f"layers.{layer}.base_samples"] = (SAMPLES,)
        if config.attributes:
            shapes.update(condition_shapes(d))
        wrong = sorted(set(shapes) ^ set(tensors))
        if wrong:
            state = "missing" if wrong[0] in shapes else "unexpected"
            raise ModelError(f"{state} tensor {wrong[0]} ({len(wrong)} in all)", where=str(path), hint="Train again.")
        for name, tensor in tensors.items():
            problem = None
            if tuple(tensor.shape) != shapes[name] or tensor.dtype != torch.float32:
                problem = f"is {tuple(tensor.shape)} {tensor.dtype}, expected {shapes[name]} torch.float32"
            elif not tensor.isfinite().all():
                problem = "holds numbers that are not finite"
            elif name.endswith("projection") and projection_error(tensor) > ORTHONORMAL_TOLERANCE:
                problem = f"has rows that are not orthonormal (error {projection_error(tensor):.1e})"
            if problem:
                raise ModelError(f"{name} {problem}", where=str(path), hint="The file is damaged; train again.")
        return tensors


def relevance_shapes(rank: int, hidden_size: int, relevance_to: str) -> dict[str, tuple[int, ...]]:
    """Shapes of the trained tensors of a layer; see `core.adapter.layer`."""
    if relevance_to == "output":
        return {"projection": (rank, hidden_size), "key_projection": (rank, hidden_size), "diagonal": (rank,)}
    # The gate has one dimension, because FSDP2 does not support scalar parameters.
    return {"projection": (rank, hidden_size), "gate": (1,)}


def parameter_count(rank: int, hidden_size: int, relevance_to: str) -> int:
    """Number of parameters in the projections and the gate of a layer."""
    return sum(math.prod(shape) for shape in relevance_shapes(rank, hidden_size, relevance_to).values())


def adapter_folder(name: str) -> Path:
    """Return the folder of an adapter, downloaded if `name` is a hub id."""
    path = files.user_path(name)
    if files.path_exists(path) or not is_hub_id(name):
        return Path(os.path.realpath(path))
    from huggingface_hub import snapshot_download

    with hub_errors(name, "adapter", any_error=True):
        return Path(snapshot_download(name, allow_patterns=_PATTERNS))


def adapter_hash(folder: Path) -> str:
    """SHA-256 over the SHA-256 of config and weights of an adapter of braces or peft."""
    hashes = [files.file_hash(folder / name, ModelError) for name in (CONFIG_FILE, WEIGHTS_FILE)]
    return files.bytes_hash(map(bytes.fromhex, hashes))


def find_adapter(name: str) -> StoredAdapter:
    """Find an adapter by folder or hub id, and read its config."""
    folder = adapter_folder(name)
    return StoredAdapter(name, folder, read_config(folder))


def write_adapter(folder: Path, tensors: dict[str, Tensor], config: AdapterConfig, card: str) -> None:
    """Write an adapter folder: weights and model card first, the config last."""
    files.write_tensors(folder / WEIGHTS_FILE, tensors)
    files.write_text(folder / CARD_FILE, card)
    files.write_json(folder / CONFIG_FILE, asdict(config))


def read_config(folder: Path) -> AdapterConfig:
    """Read and check `adapter_config.json` of an adapter of braces."""
    path = folder / CONFIG_FILE
    if not os.path.isfile(path) and not files.path_exists(path):
        hint = f"An adapter folder holds {CONFIG_FILE} and {WEIGHTS_FILE}; `braces train` writes one."
        raise ModelError(
            "no adapter here" if os.path.isdir(folder) else "no such adapter folder", where=str(folder), hint=hint
        )
    raw = read(ANY_CONFIG, path)
    if raw.get("method") != "braces":
        what = cut(raw.get("method") or raw.get("peft_type"))
        hint = "Give one of `braces train --method braces`; only `braces eval` also accepts adapters of peft."
        raise ModelError(f"not a braces adapter (method: {what})", where=str(path), hint=hint)
    version = raw.get("format_version")
    if isinstance(version, bool) or version != FORMAT_VERSION:
        what = f"format version {cut(version)}, this braces reads {FORMAT_VERSION}"
        raise ModelError(what, where=str(path), hint="Update braces.")
    config = check(_CONFIG, raw, str(path))
    layers, scales, d = config.layers, config.relevance_scale, config.base["hidden_size"]
    problems = {
        "`layers` must name at least one layer, each once and in order": not layers or layers != sorted(set(layers)),
        f"`r` is {config.r}, larger than the base's hidden size {d}": config.r > d,
        "`relevance_to` is missing": "relevance_to" not in raw,
        "`relevance_scale` must hold one positive number for each layer": len(scales) != len(layers)
        or math.inf in scales,
    }
    for what, found in problems.items():
        if found:
            raise ModelError(what, where=str(path), hint=_DAMAGED)
    return config
