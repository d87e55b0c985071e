"""GGUF files are written whole."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from braces_cli.core.errors import BracesError
from braces_cli.export.checkpoint import write_gguf_tensors

gguf = pytest.importorskip("gguf", reason="NOT TESTED: the package gguf is not there")


@pytest.mark.parametrize("size", [0, 20, 100, 300])
def test_a_file_that_a_full_disk_cut_off_is_an_error_and_does_not_stay(
    size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """numpy does not notice; reading back does, wherever the file ends."""
    close = gguf.GGUFWriter.close

    def cut_off(writer: Any) -> None:
        close(writer)
        (file,) = tmp_path.iterdir()
        assert file.stat().st_size > size
        os.truncate(file, size)

    tensors = {"direction.1": torch.arange(50.0)}
    write_gguf_tensors(tmp_path / "whole.gguf", "controlvector", tensors, lambda writer: None)
    (tmp_path / "whole.gguf").unlink()
    monkeypatch.setattr(gguf.GGUFWriter, "close", cut_off)
    with pytest.raises(BracesError, match="differs from what was meant"):
        write_gguf_tensors(tmp_path / "v.gguf", "controlvector", tensors, lambda writer: None)
    assert not list(tmp_path.iterdir())
