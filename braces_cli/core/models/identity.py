"""Tell whether an adapter belongs to a base: its type and sizes, and a hash over bytes of its value matrices.

The bytes are those of the checkpoint's files, not of the loaded weights, so that one checkpoint has one fingerprint
whatever dtype or quantisation it is loaded in. A model that came from no file, or whose experts lie in the files one by
one and in memory as one tensor, is hashed from its weights, rounded to bfloat16.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from braces_cli.core.errors import ModelError
from braces_cli.core.files import bytes_hash
from braces_cli.core.models.ffn import FFN, MixtureFFN
from braces_cli.core.models.stored_fingerprint import Fingerprint
from braces_cli.core.models.weights import dense
from braces_cli.core.schema import Kind, read_tensor_header

# Three matrices, four places in each: enough to tell checkpoints apart, and read in milliseconds from any model.
_LAYERS_SAMPLED = 3
_PLACES = 4
_BYTES = 4096
_WEIGHTS = Kind(dict[str, Any], ModelError, "Check that the download is complete.", "file of weights")


def fingerprint(model: nn.Module, ffns: Sequence[FFN | MixtureFFN], checkpoint: Path | None) -> Fingerprint:
    """`{model_type, layers, hidden_size, value_vectors, sha256}` of a base; `sha256` is None on the meta device.

    Args:
        model: the base.
        ffns: its feed-forward layers.
        checkpoint: folder with the safetensors files it was loaded from, if any.
    """
    sampled = [ffns[i] for i in sorted({0, len(ffns) // 2, len(ffns) - 1})][:_LAYERS_SAMPLED]
    names = [ffn.value_path(model) for ffn in sampled]
    digest = _hash_files(checkpoint, names) if checkpoint else None
    if digest is None:
        digest = _hash_weights(sampled)
    return {
        "model_type": getattr(getattr(model, "config", None), "model_type", type(model).__name__),
        "layers": len(ffns),
        "hidden_size": ffns[0].hidden_size,
        "value_vectors": [ffn.value_vectors for ffn in ffns],
        "sha256": digest,
    }


def differences(expected: Mapping[str, Any], found: Mapping[str, Any], owner: str = "adapter") -> list[str]:
    """What differs of a fingerprint that `owner` carries, in words; a missing hash on either side is no difference."""
    words = []
    for key in ("model_type", "layers", "hidden_size", "value_vectors"):
        if expected.get(key) != found.get(key):
            ours, theirs = _short(expected.get(key)), _short(found.get(key))
            words.append(f"{key.replace('_', ' ')}: {owner} {ours}, base {theirs}")
    if not words and expected.get("sha256") and found.get("sha256") and expected["sha256"] != found["sha256"]:
        words.append("same sizes, other weights")
    return words


def _short(value: Any) -> Any:
    """A list of equal sizes as that size."""
    return value[0] if isinstance(value, list) and len(set(value)) == 1 else value


def _hash_weights(sampled: Sequence[FFN | MixtureFFN]) -> str | None:
    stored = [ffn.parts[0].values() for ffn in sampled]
    if any(isinstance(values, Tensor) and values.is_meta for values in stored):
        return None
    parts = []
    for values in stored:
        flat = dense(values).detach().reshape(-1)
        count = _BYTES // 2
        for place in range(_PLACES):
            start = (max(len(flat) - count, 0) * place) // (_PLACES - 1)
            parts.append(flat[start : start + count].to(torch.bfloat16).view(torch.int16).cpu().numpy().tobytes())
    return bytes_hash(parts)


def _hash_files(folder: Path, names: Sequence[str]) -> str | None:
    """Hash sampled bytes of the tensors called `names`, or None where the files do not hold all of them."""
    places: dict[str, tuple[Path, int, int]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            header = read_tensor_header(file, _WEIGHTS)
        except ModelError:
            continue  # where the model's own weights lie in it, loading has refused it before
        for name, stored_at in header.tensors.items():
            begin, end = stored_at["data_offsets"]
            places[name] = (file, header.start + begin, end - begin)
    parts = []
    for name in names:
        stored = _stored_name(name, places)
        if stored is None:
            return None
        file, begin, length = places[stored]
        with file.open("rb") as handle:
            for place in range(_PLACES):
                handle.seek(begin + (max(length - _BYTES, 0) * place) // (_PLACES - 1))
                parts.append(handle.read(min(_BYTES, length)))
    return bytes_hash(parts)


def _stored_name(name: str, places: dict[str, Any]) -> str | None:
    """The name in the file: checkpoints may lack, or have in front, the prefix of the base model (`transformer.`)."""
    if name in places:
        return name
    for other in places:
        if name.endswith(f".{other}") or other.endswith(f".{name}"):
            return other
    return None
