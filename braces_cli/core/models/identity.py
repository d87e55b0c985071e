"""Fingerprint of a base: its type, its sizes, and a hash over sampled bytes of its value matrices.

The bytes are read from the checkpoint's files, so that a checkpoint has one fingerprint in every dtype and
quantisation. A model without files, or with experts that are separate in the files and one tensor in memory, is hashed
from its weights, rounded to bfloat16. Imports no torch at the top, because file formats use `Fingerprint`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from braces_cli.core.errors import ModelError
from braces_cli.core.files import bytes_hash
from braces_cli.core.schema import Count, Kind, Size, read_tensor_header

if TYPE_CHECKING:
    from torch import nn

    from braces_cli.core.models.ffn import FFN, MixtureFFN

# Samples of three matrices distinguish checkpoints, and are read in milliseconds from a model of any size.
_PLACES = 4
_BYTES = 4096
_WEIGHTS = Kind(dict[str, Any], ModelError, "Check that the download is complete.", "file of weights")


class Fingerprint(TypedDict):
    """Type, sizes and hash of a base; the hash is None on the meta device."""

    model_type: str
    layers: Count
    hidden_size: Size
    value_vectors: list[Count]
    sha256: str | None


# Placeholder for a base that has not been read.
UNKNOWN = Fingerprint(model_type="", layers=0, hidden_size=0, value_vectors=[], sha256=None)


def fingerprint(model: nn.Module, ffns: Sequence[FFN | MixtureFFN], checkpoint: Path | None) -> Fingerprint:
    """Return the fingerprint of a base.

    Args:
        ffns: FFNs of the model.
        checkpoint: folder with the safetensors files of the model, if any.
    """
    sampled = [ffns[i] for i in sorted({0, len(ffns) // 2, len(ffns) - 1})]
    digest = _hash_files(checkpoint, [ffn.value_path(model) for ffn in sampled]) if checkpoint else None
    return {
        "model_type": getattr(getattr(model, "config", None), "model_type", type(model).__name__),
        "layers": len(ffns),
        "hidden_size": ffns[0].hidden_size,
        "value_vectors": [ffn.value_vectors for ffn in ffns],
        "sha256": digest or _hash_weights(sampled),
    }


def differences(expected: Mapping[str, Any], found: Mapping[str, Any], owner: str = "adapter") -> list[str]:
    """Describe the differences between the fingerprint in `owner` and that of a base; a missing hash is not one."""
    words = []
    for key in ("model_type", "layers", "hidden_size", "value_vectors"):
        if expected.get(key) != found.get(key):
            ours, theirs = _short(expected.get(key)), _short(found.get(key))
            words.append(f"{key.replace('_', ' ')}: {owner} {ours}, base {theirs}")
    if not words and expected.get("sha256") and found.get("sha256") and expected["sha256"] != found["sha256"]:
        words.append("same sizes, other weights")
    return words


def _short(value: Any) -> Any:
    """Return a list of equal sizes as that size."""
    return value[0] if isinstance(value, list) and len(set(value)) == 1 else value


def _hash_weights(sampled: Sequence[FFN | MixtureFFN]) -> str | None:
    import torch

    from braces_cli.core.models.weights import dense

    stored = [ffn.parts[0].values() for ffn in sampled]
    if any(isinstance(values, torch.Tensor) and values.is_meta for values in stored):
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
    """Hash sampled bytes of the tensors `names`; None if the files do not contain all of them."""
    places: dict[str, tuple[Path, int, int]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            header = read_tensor_header(file, _WEIGHTS)
        except ModelError:
            continue  # not a file of the model: loading the model reads its own files first
        for name, stored_at in header.tensors.items():
            begin, end = stored_at["data_offsets"]
            places[name] = (file, header.start + begin, end - begin)
    parts = []
    for name in names:
        # Names in checkpoints may lack the prefix of the base model (`transformer.`), or have an additional one.
        matches = [other for other in places if name.endswith(f".{other}") or other.endswith(f".{name}")]
        stored = name if name in places else next(iter(matches), None)
        if stored is None:
            return None
        file, begin, length = places[stored]
        with file.open("rb") as handle:
            for place in range(_PLACES):
                handle.seek(begin + (max(length - _BYTES, 0) * place) // (_PLACES - 1))
                parts.append(handle.read(min(_BYTES, length)))
    return bytes_hash(parts)
