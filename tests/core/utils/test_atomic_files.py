"""Files that are written whole, with the same bytes each time; only what killed processes left is removed."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from braces_cli.core.errors import BracesError
from braces_cli.core.files import check_writable, disk_error, remove_partial_files, write_atomic, write_tensors


def test_the_same_tensors_and_metadata_give_the_same_bytes(tmp_path: Path) -> None:
    """safetensors orders metadata at random; the file is one that safetensors reads."""
    metadata = {name: name * 3 for name in "zyxwvutsrqponm"} | {"word": 'quoted "ä" \n'}
    tensors = {"b": torch.arange(5.0), "a": torch.ones(2, 3, dtype=torch.bfloat16)}
    contents = set()
    for turn in range(8):
        write_tensors(tmp_path / f"{turn}.safetensors", tensors, metadata)
        contents.add((tmp_path / f"{turn}.safetensors").read_bytes())
    assert len(contents) == 1
    back = load_file(tmp_path / "0.safetensors")
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())
    with safe_open(tmp_path / "0.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt", **metadata}


def test_nan_is_no_fault_of_the_disk(tmp_path: Path) -> None:
    """NaN never equals NaN: bytes are compared. What was written otherwise is still found."""
    write_tensors(tmp_path / "nan.safetensors", {"a": torch.tensor([float("nan"), 1.0])})
    assert load_file(tmp_path / "nan.safetensors")["a"].isnan().tolist() == [True, False]
    with pytest.raises(BracesError, match="differs from what was meant"):
        write_atomic(tmp_path / "x", lambda path: path.write_bytes(b"ab"), lambda path: path.read_bytes() == b"ac")
    assert not (tmp_path / "x").exists()


def test_only_half_written_files_of_that_name_are_removed(tmp_path: Path) -> None:
    """A folder or a file; names of users that look alike stay."""
    (tmp_path / ".out.abcd_123.partial" / "weights").mkdir(parents=True)
    (tmp_path / ".out.12345678.partial").touch()
    kept = [
        ".out.lock",
        ".out.partial",
        ".out.txt.12345678.partial",
        "out",
        ".out.1234567890.partial",
        ".outx.12345678.partial",
    ]
    for name in kept:
        (tmp_path / name).touch()
    remove_partial_files(tmp_path, "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)


def test_looking_whether_a_folder_can_be_written_to_makes_no_name_in_it(tmp_path: Path) -> None:
    """Not even for a moment, in which the process could be killed: the folder has never changed."""
    try:
        os.close(os.open(tmp_path, os.O_TMPFILE | os.O_RDWR))
    except (AttributeError, OSError):
        pytest.skip("no files without names here")
    os.utime(tmp_path, ns=(0, 0))
    check_writable(tmp_path / "new" / "out")
    assert tmp_path.stat().st_mtime_ns == 0


def test_a_full_disk_is_recognised_in_the_words_of_a_library(tmp_path: Path) -> None:
    """And nothing else: a file that is not there is no fault of the disk."""
    error = disk_error("Error while serializing: I/O error: No space left on device (os error 28)", tmp_path)
    assert error is not None
    assert (error.errno, error.filename) == (errno.ENOSPC, str(tmp_path))
    assert disk_error("No such file or directory (os error 2)", tmp_path) is None
    assert disk_error("header too large", tmp_path) is None
