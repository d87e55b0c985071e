"""Atomic writes, hashes, path checks, and locks: one command at a time writes to an output."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from braces_cli.core import files
from braces_cli.core.errors import BracesError, ConfigError, DataError

_HOLDER = """
import sys, time
from pathlib import Path
from braces_cli.core.files import output_lock
with output_lock(Path(sys.argv[1])):
    Path(sys.argv[1]).with_name(".out.12345678.partial").write_text("half")
    print("held", flush=True)
    time.sleep(600)
"""


def test_equal_tensors_and_metadata_give_equal_bytes(tmp_path: Path) -> None:
    """safetensors writes metadata in random order; the result is still a safetensors file. NaN is written as it is."""
    metadata = {name: name * 3 for name in "zyxwvutsrqponm"} | {"word": 'quoted "ä" \n'}
    tensors = {"b": torch.tensor([float("nan"), 1.0]), "a": torch.ones(2, 3, dtype=torch.bfloat16)}
    contents = set()
    for turn in range(8):
        files.write_tensors(tmp_path / f"{turn}.safetensors", tensors, metadata)
        contents.add((tmp_path / f"{turn}.safetensors").read_bytes())
    assert len(contents) == 1
    back = load_file(tmp_path / "0.safetensors")
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name].nan_to_num(7), tensor.nan_to_num(7)) for name, tensor in tensors.items())
    with safe_open(tmp_path / "0.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt", **metadata}


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    """No part of the new content is at the path or next to the path."""
    (tmp_path / "x").write_text("old")

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(BracesError, match="cannot write: No space left on device"):
        files.write_atomic(tmp_path / "x", fail)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("x", "old")]


def test_only_partial_files_of_that_name_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".out.abcd_123.partial" / "weights").mkdir(parents=True)
    (tmp_path / ".out.12345678.partial").touch()
    others = [".out.lock", ".out.partial", ".out.txt.12345678.partial", "out", ".out.1234567890.partial"]
    for name in others:
        (tmp_path / name).touch()
    files.remove_partial_files(tmp_path, "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(others)


def test_an_output_overlaps_no_input(tmp_path: Path) -> None:
    """The same folder, a folder in the input, a folder that contains the input, and a link to the input."""
    source = tmp_path / "models" / "base"
    source.mkdir(parents=True)
    (tmp_path / "link").symlink_to(source)
    for output in (source, source / "new", tmp_path / "models", tmp_path / "link"):
        with pytest.raises(ConfigError, match="overlaps the input"):
            files.check_apart(output, None, source)
    files.check_apart(tmp_path / "models" / "other", source, "owner/name")


def test_hashes(tmp_path: Path) -> None:
    """One hash for equal bytes; a file that cannot be read raises the requested error."""
    (tmp_path / "a").write_bytes(b'"ab"')
    assert files.file_hash(tmp_path / "a", DataError) == files.bytes_hash([b'"a', b'b"']) == files.value_hash("ab")
    with pytest.raises(DataError, match="no such file"):
        files.file_hash(tmp_path / "b", DataError)


def test_the_message_names_the_process_until_it_ends(tmp_path: Path) -> None:
    """After SIGKILL the next command takes the lock and removes the partial file."""
    call = [sys.executable, "-c", _HOLDER, str(tmp_path / "out")]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(call, stdout=subprocess.PIPE, text=True, env=env) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            with pytest.raises(ConfigError) as caught, files.output_lock(tmp_path / "out"):
                pass
            assert f"(process {holder.pid} on {socket.gethostname()}, since 20" in caught.value.message
        finally:
            holder.send_signal(signal.SIGKILL)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.12345678.partial", ".out.lock"]
    with files.output_lock(tmp_path / "out"):
        assert [path.name for path in tmp_path.iterdir()] == [".out.lock"]
        with pytest.raises(ConfigError, match=f"process {os.getpid()}"), files.output_lock(tmp_path / "out"):
            pass
    assert list(tmp_path.iterdir()) == []


def test_only_outputs_remain(tmp_path: Path) -> None:
    """New empty folders are removed; a link has the lock of its target; an output in another one has no lock."""
    with files.output_lock(tmp_path / "a" / "b" / "out"):
        (tmp_path / "a" / "b" / "out").mkdir()
    assert list(tmp_path.iterdir()) == []
    with files.output_lock(tmp_path / "a" / "out.txt", None):
        (tmp_path / "a" / "out.txt").write_text("text")
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "out.txt"]
    (tmp_path / "link").symlink_to(tmp_path / "a")
    with (
        files.output_lock(tmp_path / "a"),
        pytest.raises(ConfigError, match="another"),
        files.output_lock(tmp_path / "link"),
    ):
        pass
    with files.output_lock(tmp_path / "scores" / "plot.png", tmp_path / "scores"):
        assert (tmp_path / ".scores.lock").exists()
        assert not (tmp_path / "scores").exists()


def test_an_output_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in ("x" * 300, "new/" + "x" * 300, "file/out", "loop/out"):
        with pytest.raises(ConfigError, match="cannot write there"), files.output_lock(tmp_path / name):
            pass
        assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "loop"]


def test_devices_and_other_processes_of_a_launch_need_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with files.output_lock(Path(os.devnull)), files.output_lock(Path(os.devnull)):
        pass
    with files.output_lock(tmp_path / "out"):
        monkeypatch.setenv("RANK", "1")
        monkeypatch.setenv("WORLD_SIZE", "2")
        with files.output_lock(tmp_path / "out"):
            pass
