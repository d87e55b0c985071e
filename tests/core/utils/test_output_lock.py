"""One process at a time: who holds a lock is named, a killed holder holds nothing, and no file stays behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from braces_cli.core.errors import ConfigError
from braces_cli.core.files import output_lock

_HOLDER = """
import sys, time
from pathlib import Path
from braces_cli.core.files import output_lock
with output_lock(Path(sys.argv[1])):
    Path(sys.argv[1]).with_name(".out.12345678.partial").write_text("half")
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of `out`."""
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLDER, str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_the_holder_is_named_until_it_dies(holder, tmp_path):
    """Process, host and start; by SIGKILL the lock goes, and what it left is removed by the next holder."""
    with pytest.raises(ConfigError) as caught, output_lock(tmp_path / "out"):
        pass
    assert f"(process {holder.pid} on {socket.gethostname()}, since 20" in caught.value.message
    assert "Wait until it has ended" in str(caught.value.hint)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.12345678.partial", ".out.lock"]
    with output_lock(tmp_path / "out"):
        assert [path.name for path in tmp_path.iterdir()] == [".out.lock"]
        with pytest.raises(ConfigError, match=f"process {os.getpid()}"), output_lock(tmp_path / "out"):
            pass
    assert list(tmp_path.iterdir()) == []


def test_nothing_stays_but_what_was_written(tmp_path):
    """New folders above the output go where it came to nothing; a symbolic link has the lock of its target."""
    with output_lock(tmp_path / "a" / "b" / "out"):
        (tmp_path / "a" / "b" / "out").mkdir()
    assert list(tmp_path.iterdir()) == []
    with output_lock(tmp_path / "a" / "out.txt", None):
        (tmp_path / "a" / "out.txt").write_text("text")
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "out.txt"]
    (tmp_path / "link").symlink_to(tmp_path / "a")
    with output_lock(tmp_path / "a"), pytest.raises(ConfigError, match="another"), output_lock(tmp_path / "link"):
        pass


def test_of_several_outputs_all_are_free_again(tmp_path):
    """Where one of them is taken, the others are let go of."""
    with output_lock(tmp_path / "two"):
        with pytest.raises(ConfigError), output_lock(tmp_path / "one", tmp_path / "two"):
            pass
        with output_lock(tmp_path / "one"):
            pass


def test_an_output_that_cannot_be_written_is_an_error_of_the_call(tmp_path):
    """Too long a name, a file for a folder, a link to itself: exit 2, and nothing is left."""
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in ("x" * 300, "new/" + "x" * 300, "file/out", "loop", "loop/out"):
        with pytest.raises(ConfigError, match=r"cannot write there|leads to itself"), output_lock(tmp_path / name):
            pass
        assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "loop"]


def test_an_output_in_another_has_no_lock_of_its_own(tmp_path):
    """As `--output-dir scores --plot scores/plot.png`: the folder would not be empty any more."""
    with output_lock(tmp_path / "scores" / "plot.png", tmp_path / "scores"):
        assert [path.name for path in tmp_path.rglob("*")] == [".scores.lock"]


def test_devices_have_no_lock_and_other_processes_of_a_launch_take_none(tmp_path, monkeypatch):
    """Two commands may write to /dev/null; only the first process of a launch writes."""
    with output_lock(Path(os.devnull)), output_lock(Path(os.devnull)):
        pass
    with output_lock(tmp_path / "out"):
        monkeypatch.setenv("RANK", "1")
        with output_lock(tmp_path / "out"):
            pass


def test_a_folder_whose_parent_takes_no_file_is_locked_itself(tmp_path, monkeypatch):
    """As where a disk is mounted; the holder then has no name."""
    real = os.open

    def refused(path, *args, **kwargs):
        if str(path).endswith(".lock"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", refused)
    out = tmp_path / "out"
    out.mkdir()
    with output_lock(out), pytest.raises(ConfigError, match=r"is writing there\n"), output_lock(out):
        pass
    with output_lock(out):
        pass
    with pytest.raises(ConfigError, match="cannot write there"), output_lock(tmp_path / "file.txt"):
        pass
