"""GGUF files, written whole. Needs the package gguf."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from braces_cli.core.utils.atomic_files import write_atomic


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
